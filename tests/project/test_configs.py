"""The examples in configs/ are files the command line would take."""

from __future__ import annotations

from pathlib import Path

import pytest

from hkv_jax.config import EngineConfig, engine_options, read_toml

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))
ENGINE = [option.name for option in engine_options()]
SERVE = ["host", "port"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_example_sets_only_options_that_exist_to_values_they_take(path: Path) -> None:
    values = read_toml(path, [*ENGINE, *SERVE])
    settled = EngineConfig.from_options({name: value for name, value in values.items() if name in ENGINE})
    assert str(settled.model) == values["model"]
    assert settled.max_model_len == values["max_model_len"]


def test_there_are_examples_and_nothing_else() -> None:
    folder = Path(__file__).resolve().parents[2] / "configs"
    assert CONFIGS
    assert sorted(folder.iterdir()) == CONFIGS
