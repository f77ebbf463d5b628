"""The check of cached prefixes on a real model, on a tiny one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hkv_jax.engine.engine import Engine
from tools.check_prefix_reuse import Reader, check_document, check_repeat, open_engine, table

MODEL = Path(__file__).parents[1] / "golden" / "data" / "gemma3_text"


def tokens(count: int, seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(3, 250, count).tolist()
    return ids


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine(MODEL, 320, "8MiB")


@pytest.fixture
def reader(engine: Engine) -> Reader:
    engine.cache.reset()
    return Reader(engine, new_tokens=8)


@pytest.mark.slow
def test_it_tells_how_each_request_was_served(reader: Reader) -> None:
    # Seven layers of window 16 in blocks of 16, global blocks of 32: R is 106, so that 128 tokens are run.
    assert check_document(reader, tokens(256, 0), [tokens(9, 1), tokens(5, 2)])
    assert check_repeat(reader, tokens(96, 3))
    served = [(answer.prompt_tokens, answer.hit, answer.start, answer.rebuilt_tokens) for answer in reader.answers]
    assert served == [
        (257, "miss", 0, 0),
        (265, "rebuild", 128, 128),
        (261, "resident", 256, 0),
        (265, "miss", 0, 0),
        (261, "miss", 0, 0),
        (96, "miss", 0, 0),
        (96, "resident", 64, 0),
    ]
    assert len(table(reader.answers)) == 2 + 7


@pytest.mark.slow
def test_a_wrong_rebuild_is_told(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader.engine.cache.prefixes, "rebuild_tokens", 16)
    assert not check_document(reader, tokens(256, 0), [tokens(9, 1), tokens(5, 2)])
