"""Training state on disk: arrays in safetensors, the rest in JSON, so that a run goes on where it was stopped.

Owns: the two files of a run and their order of writing. Must never: pickle.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from tools.demo_training.model import Parameters

_ARRAYS, _RECORD = "state.safetensors", "record.json"


@dataclasses.dataclass
class State:
    """Parameters, the optimiser's state (a tree of optax), steps done, and one record of the curve for each report."""

    parameters: Parameters
    optimiser: Any
    step: int = 0
    curve: list[dict[str, float]] = dataclasses.field(default_factory=list)


def save(folder: Path, state: State, identity: dict[str, Any]) -> None:
    """Write a state; one that is cut short leaves the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"parameters.{name}": np.asarray(array) for name, array in state.parameters.items()}
    leaves = jax.tree.leaves(state.optimiser)
    arrays |= {f"optimiser.{index}": np.asarray(leaf) for index, leaf in enumerate(leaves)}
    record = json.dumps({"identity": identity, "step": state.step, "curve": state.curve}, indent=1)
    # One file holds arrays and record alike, so that they can never be of two steps; the record is also told apart.
    partial = folder / f"{_ARRAYS}.partial"
    save_file(arrays, partial, metadata={"record": record})
    os.replace(partial, folder / _ARRAYS)
    (folder / _RECORD).write_text(record + "\n", encoding="utf-8")


def restore(folder: Path, fresh: State, identity: dict[str, Any]) -> State:
    """The state in ``folder``, or ``fresh`` where there is none.

    Raises:
        SystemExit: the folder holds a run of another identity (seed, stages, shape).
    """
    path = folder / _ARRAYS
    if not path.exists():
        return fresh
    record = _record(path)
    if record["identity"] != json.loads(json.dumps(identity)):
        raise SystemExit(f"{folder} holds a run of other settings; name another --run or remove it")
    arrays = load_file(path)
    old, structure = jax.tree.flatten(fresh.optimiser)
    leaves = [jnp.asarray(arrays[f"optimiser.{index}"]) for index in range(len(old))]
    parameters = {name: jnp.asarray(arrays[f"parameters.{name}"]) for name in fresh.parameters}
    return State(parameters, jax.tree.unflatten(structure, leaves), record["step"], record["curve"])


def _record(path: Path) -> dict[str, Any]:
    """The record in the header of a safetensors file: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    record: dict[str, Any] = json.loads(header["__metadata__"]["record"])
    return record
