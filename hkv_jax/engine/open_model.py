"""From a configuration to a model that takes requests; what the Python face and the server both begin with.

Owns: the order of the parts. Must never: import jax itself (``engine.factory`` does, when it is called).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from hkv_jax.config import EngineConfig
from hkv_jax.engine.engine import Engine
from hkv_jax.engine.loop import EngineLoop, ServedModel
from hkv_jax.families import read_generation_defaults
from hkv_jax.kvcache.layout import KVLayout
from hkv_jax.spec import ModelSpec
from hkv_jax.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
"""Told what was just done, how many things are done, and how many there are."""


class EngineParts(Protocol):
    """What an engine factory returns; the real one gives more."""

    @property
    def engine(self) -> Engine:
        """Idle, and warm."""
        ...

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""
        ...

    @property
    def layout(self) -> KVLayout:
        """How its KV memory is split."""
        ...


EngineFactory = Callable[[EngineConfig, Progress | None], EngineParts]


@dataclasses.dataclass(frozen=True, slots=True)
class OpenModel:
    """A model that takes requests through ``loop``; ``layout`` says how its KV memory is split."""

    config: EngineConfig
    spec: ModelSpec
    layout: KVLayout
    tokenizer: Tokenizer
    loop: EngineLoop


def open_model(
    config: EngineConfig,
    *,
    progress: Progress | None = None,
    max_queue: int | None = None,
    engine_factory: EngineFactory | None = None,
) -> OpenModel:
    """Loads, compiles and warms up; returns when the first request may come.

    Args:
        config: what to open.
        progress: told of each step of the warm-up.
        max_queue: most requests that may wait for their first token, ``None`` for any number.
        engine_factory: makes the engine; the real one by default, a fake in tests.

    Raises:
        ConfigError: the configuration, the environment or the model's files are wrong.
        CheckpointError: the checkpoint is incomplete or broken.
    """
    # What costs nothing comes first: a broken tokenizer should not show after minutes of loading.
    tokenizer = Tokenizer.from_folder(config.model)
    tokenizer.load()
    defaults = _sampling_defaults(config)
    if engine_factory is None:
        from hkv_jax.engine.factory import build_engine

        engine_factory = build_engine
    parts = engine_factory(config, progress)
    model = ServedModel(tokenizer, parts.spec.eos_token_ids, defaults)
    loop = EngineLoop(parts.engine, model, max_queue=max_queue)
    return OpenModel(config, parts.spec, parts.layout, tokenizer, loop)


def _sampling_defaults(config: EngineConfig) -> Mapping[str, Any]:
    return read_generation_defaults(config.model) if config.generation_config == "model" else {}
