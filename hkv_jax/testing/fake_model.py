"""A model folder and an engine factory without weights: for tests of everything that opens a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from hkv_jax.config import EngineConfig
from hkv_jax.engine.engine import Engine
from hkv_jax.engine.open_model import EngineFactory, Progress
from hkv_jax.kvcache.layout import KVLayout
from hkv_jax.spec import Activation, LayerKind, LayerSpec, ModelSpec, RopeSpec
from hkv_jax.testing.fake_engine import FakeEngineConfig, fake_engine
from hkv_jax.testing.tiny_tokenizer import byte_level_tokenizer, write_tokenizer

FAKE_ENGINE = FakeEngineConfig(vocab_size=byte_level_tokenizer().get_vocab_size())
"""An engine with the vocabulary of ``byte_level_tokenizer``."""


@dataclasses.dataclass(frozen=True, slots=True)
class FakeParts:
    """What the factory returns."""

    engine: Engine
    spec: ModelSpec
    layout: KVLayout


def write_fake_model(folder: Path, *, chat_template: str | None = None) -> Path:
    """Writes a folder with the tokenizer of ``byte_level_tokenizer`` and no weights; returns it."""
    write_tokenizer(folder, byte_level_tokenizer(), chat_template=chat_template)
    return folder


def fake_spec(vocab_size: int) -> ModelSpec:
    """A model of one global and one sliding layer that ends at id 1."""
    rope = RopeSpec(10000.0)
    return ModelSpec(
        architecture="fake",
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_heads=1,
        layers=(LayerSpec(LayerKind.GLOBAL, None, 1, 8, rope), LayerSpec(LayerKind.SLIDING, 10, 2, 8, rope)),
        activation=Activation.SILU,
        norm_eps=1e-6,
        attention_scale=1.0,
        max_position=1024,
        eos_token_ids=(1,),
        dtype="float32",
    )


def fake_engine_factory(
    fake: FakeEngineConfig = FAKE_ENGINE, make_engine: Callable[[FakeEngineConfig], Engine] = fake_engine
) -> EngineFactory:
    """A factory of engines with the limits of ``fake``, whatever the configuration says."""

    def factory(config: EngineConfig, progress: Progress | None) -> FakeParts:
        if progress is not None:
            progress(f"nothing of {config.model.name}", 1, 1)
        return FakeParts(make_engine(fake), fake_spec(fake.vocab_size), fake.layout())

    return factory
