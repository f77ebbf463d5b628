"""Training state on disk: arrays in safetensors, the rest in its metadata, so that a run goes on where it was stopped.

Owns: the file of a run, one, so that arrays and record can never be of two steps. Must never: pickle.
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
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from tools.demo_training.model import Parameters

_ARRAYS = "state.safetensors"


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
    record = json.dumps({"identity": identity, "step": state.step, "curve": state.curve})
    partial = folder / f"{_ARRAYS}.partial"
    save_file(arrays, partial, metadata={"record": record})
    os.replace(partial, folder / _ARRAYS)


def restore(folder: Path, fresh: State, identity: dict[str, Any]) -> State:
    """The state in ``folder``, or ``fresh`` where there is none.

    Raises:
        SystemExit: the folder holds a run of another identity (seed, stages, shape, rates), or no run at all.
    """
    path = folder / _ARRAYS
    if not path.exists():
        return fresh
    try:
        with safe_open(path, framework="numpy") as file:
            record = json.loads(file.metadata()["record"])
        arrays = load_file(path)
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise SystemExit(f"{path} is not the state of a run ({error}); remove it or name another RUN folder") from error
    given, found = json.loads(json.dumps(identity)), record["identity"]
    if found != given:
        differs = ", ".join(name for name in given if found.get(name) != given[name])
        raise SystemExit(f"{folder} holds a run of other settings ({differs}); name another RUN folder or remove it")
    old, structure = jax.tree.flatten(fresh.optimiser)
    leaves = [jnp.asarray(arrays[f"optimiser.{index}"]) for index in range(len(old))]
    parameters = {name: jnp.asarray(arrays[f"parameters.{name}"]) for name in fresh.parameters}
    return State(parameters, jax.tree.unflatten(structure, leaves), record["step"], record["curve"])
