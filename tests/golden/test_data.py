"""The golden data can tell right from wrong: its own conditions, read back from the files that are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hkv_jax.families import read_model_spec
from tools.golden_families import FAMILIES, WINDOW

DATA = Path(__file__).parent / "data"
RECORD: dict[str, Any] = json.loads((DATA / "record.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_runs_are_varied_and_decided(name: str) -> None:
    golden = np.load(DATA / name / "golden.npz")
    stops = read_model_spec(DATA / name).eos_token_ids
    lengths = []
    for index in range(sum(key.startswith("prompt_") for key in golden)):
        prompt, greedy = golden[f"prompt_{index}"], golden[f"greedy_{index}"]
        lengths.append(len(prompt))
        assert len(greedy) == len(golden[f"margin_{index}"]) == 48
        assert len(set(greedy.tolist())) >= 16
        assert golden[f"margin_{index}"].min() >= 1e-3
        assert not set(stops) & {*greedy.tolist(), *prompt.tolist()}
        logits = golden[f"logits_{index}"]
        assert logits.dtype == np.float32 and len(logits) == len(prompt)
        assert logits[-1].argmax() == greedy[0]
    assert {1, WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW} <= set(lengths)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_damage_shows(name: str) -> None:
    changes = RECORD[name]["logit_change_when_damaged"]
    assert set(changes) == set(FAMILIES[name].damages)
    assert min(changes.values()) > 1e-2
    assert RECORD[name]["float64_minus_float32"] < 2e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_committed_config_is_the_tools(name: str) -> None:
    assert json.loads((DATA / name / "config.json").read_text(encoding="utf-8")) == FAMILIES[name].config
