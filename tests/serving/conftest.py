"""What the tests of the service share."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hkv_jax.engine.open_model
import hkv_jax.llm
from hkv_jax.config import EngineConfig
from hkv_jax.testing.fake_engine import fake_engine
from hkv_jax.testing.tiny_tokenizer import byte_level_tokenizer, write_tokenizer
from hkv_jax.tokenizer import Tokenizer
from serving.testing import LIMITS

TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}|{% endfor %}"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, byte_level_tokenizer())
    return Tokenizer.from_folder(folder)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with a tokenizer, opened with an engine that needs nothing else."""
    write_tokenizer(tmp_path, byte_level_tokenizer(), chat_template=TEMPLATE)

    def fake_parts(config: EngineConfig, progress: Callable[[str, int, int], None] | None) -> Any:
        if progress is not None:
            progress("decode 8", 1, 1)
        spec = SimpleNamespace(eos_token_ids=(1,))
        return SimpleNamespace(engine=fake_engine(LIMITS), spec=spec, layout=LIMITS.layout())

    llm = functools.partial(hkv_jax.llm.LLM, engine_factory=fake_parts)
    open_model = functools.partial(hkv_jax.engine.open_model.open_model, engine_factory=fake_parts)
    monkeypatch.setattr(hkv_jax.llm, "LLM", llm)
    monkeypatch.setattr(hkv_jax.engine.open_model, "open_model", open_model)
    return tmp_path


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
