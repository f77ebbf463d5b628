"""What an engine is built from: the CPU's cache where nobody says how large, and options on their way; no compiling."""

from __future__ import annotations

from pathlib import Path

import pytest

from hkv_jax.config import EngineConfig
from hkv_jax.engine import factory
from hkv_jax.errors import ConfigError
from hkv_jax.families import read_model_spec
from hkv_jax.kvcache.layout import KVLayout

MODEL = Path(__file__).parents[1] / "golden" / "data" / "gemma3_text"


def layout(monkeypatch: pytest.MonkeyPatch, host_bytes: int, **options: object) -> KVLayout:
    monkeypatch.setattr(factory, "host_memory_bytes", lambda: host_bytes)
    config = EngineConfig(model=MODEL, dtype="float32", **options)  # type: ignore[arg-type]
    return factory._layout(factory._plan(config, read_model_spec(MODEL)))


@pytest.mark.parametrize("max_num_seqs", [1, 2, 16])
def test_few_sequences_do_not_shorten_the_longest(monkeypatch: pytest.MonkeyPatch, max_num_seqs: int) -> None:
    planned = layout(monkeypatch, 1 << 30, max_num_seqs=max_num_seqs)
    assert planned.max_model_len == read_model_spec(MODEL).max_position
    assert planned.max_num_sequences_of_expected >= max_num_seqs


def test_no_more_is_taken_than_its_sequences_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (layout(monkeypatch, 1 << 30, max_num_seqs=n, max_model_len=1000).total_bytes for n in (1, 2))
    assert one < two < 1 << 22


def test_a_small_host_shortens_the_longest_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = layout(monkeypatch, 1 << 20)
    assert planned.total_bytes <= 1 << 18
    assert planned.max_model_len < read_model_spec(MODEL).max_position
    with pytest.raises(ConfigError, match="max_model_len at most"):
        layout(monkeypatch, 1 << 20, max_model_len=8192)


def test_options_of_the_prefix_cache_reach_scheduler_and_cache() -> None:
    spec = read_model_spec(MODEL)
    given = EngineConfig(
        model=MODEL,
        kv_cache_memory=2**20,
        enable_prefix_caching=False,
        tail_repair="off",
        max_bypass_seconds=4,
        max_prefix_wait_seconds=0,
    )
    for config, expected in (
        (EngineConfig(model=MODEL, kv_cache_memory=2**20), (True, True, 30, 30)),
        (given, (False, False, 4, 0)),
    ):
        plan = factory._plan(config, spec)
        policy, limits = plan.cache_policy(), plan.scheduler_config(factory._layout(plan))
        assert (
            policy.enabled,
            policy.tail_repair,
            limits.max_bypass_seconds,
            limits.max_prefix_wait_seconds,
        ) == expected
