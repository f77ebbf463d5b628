"""Loops over fake engines, closed after the test whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hkv_jax.engine.engine import Engine
from hkv_jax.engine.loop import EngineLoop, ServedModel
from hkv_jax.kvcache import room
from hkv_jax.testing.fake_engine import FakeEngineConfig, fake_engine
from hkv_jax.testing.stepped_engine import SteppedEngine
from hkv_jax.testing.tiny_tokenizer import byte_level_tokenizer, write_tokenizer
from hkv_jax.tokenizer import Tokenizer

CONFIG = FakeEngineConfig(vocab_size=byte_level_tokenizer().get_vocab_size())


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, byte_level_tokenizer())
    return ServedModel(Tokenizer.from_folder(folder), eos_token_ids=(1,))


@pytest.fixture
def short_sighted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Admission counts no token that is not known yet: in small pools this is how preemptions come about."""
    monkeypatch.setattr(room, "GROWTH_TOKENS", 0)


Opener = Callable[..., EngineLoop]


@pytest.fixture
def open_loop(model: ServedModel) -> Iterator[Opener]:
    """Opens loops and closes them after the test."""
    loops: list[EngineLoop] = []

    def opener(engine: Any = None, **options: Any) -> EngineLoop:
        options.setdefault("model", model)
        loops.append(EngineLoop(engine or fake_engine(CONFIG), **options))
        return loops[-1]

    yield opener
    for loop in loops:
        loop.close()


@pytest.fixture
def engine() -> Engine:
    return fake_engine(CONFIG)


@pytest.fixture
def stepped() -> Iterator[SteppedEngine]:
    """An engine that waits for the test; it is let go at the end, so that its loop can be closed."""
    engine = SteppedEngine(CONFIG)
    yield engine
    engine.run_freely()
