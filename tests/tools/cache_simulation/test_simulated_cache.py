"""The cache of a simulation is the one the engine would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hkv_jax.config import EngineConfig
from hkv_jax.errors import ConfigError
from hkv_jax.kvcache.layout import KVLayout
from tools.cache_simulation.model_geometry import read_geometry
from tools.cache_simulation.simulated_cache import simulated_layout, simulated_limits

MODELS = Path(__file__).resolve().parents[3] / "benchmarks" / "models"
GEMMA = read_geometry(MODELS / "gemma3-27b.json")
GIB = 2**30


def layout(share: float | None = None, **options: Any) -> KVLayout:
    config = EngineConfig.from_options({"kv_cache_memory": 12 * GIB, "max_model_len": 16_384, **options})
    return simulated_layout(config, GEMMA, share)


def test_pages_are_the_tpu_kernels_in_bfloat16_unless_told_otherwise() -> None:
    usual = {group.spec.name: group.format for group in layout().groups}
    # Planes of 128 lanes: 16 heads of K and of V, 64 tokens, 2 bytes; a page a layer.
    assert usual["global"].page_bytes == 2 * 16 * 64 * 128 * 2
    assert usual["sliding"].block_bytes == 52 * usual["global"].page_bytes
    wide = {group.spec.name: group.format for group in layout(kv_cache_dtype="float32").groups}
    assert wide["global"].page_bytes == 2 * usual["global"].page_bytes
    two_chips = {group.spec.name: group.format for group in layout(tensor_parallel_size=2).groups}
    assert two_chips["global"].page_bytes == usual["global"].page_bytes // 2
    assert {group.format.layout.value for group in layout(attention_backend="xla").groups} == {"rows"}
    assert {group.format.block_size for group in layout(block_size=128).groups} == {128}


def test_sizes_for_sliding_layers_do_not_matter_without_windows() -> None:
    config = EngineConfig.from_options(
        {"kv_cache_memory": 12 * GIB, "max_model_len": 16_384, "block_size": "global=64,sliding=32"}
    )
    assert [group.format.block_size for group in simulated_layout(config, GEMMA.all_global()).groups] == [64]


def test_limits_are_those_of_a_tpu_unless_told_otherwise() -> None:
    config = EngineConfig(kv_cache_memory=12 * GIB, max_model_len=16_384)
    limits = simulated_limits(config, simulated_layout(config, GEMMA))
    assert (limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_model_len) == (256, 2048, 16_384)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_static_split_at_a_share(share: float) -> None:
    split = layout(share, kv_partition="static")
    held = {group.spec.name: group.num_bytes / (12 * GIB) for group in split.groups}
    assert held["global"] == pytest.approx(share, abs=0.001)
    assert held["sliding"] == pytest.approx(1 - share, abs=0.005)
    assert split.total_bytes <= 12 * GIB
    for group in split.groups:
        assert group.num_blocks >= group.floor_blocks
        assert split.arenas[group.arena].num_slabs == len(group.initial_slabs)


def test_a_split_that_would_hold_no_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0\.999 leaves the sliding pool 0\.001 .*; one sequence of 16384"):
        layout(0.999, kv_partition="static")
    with pytest.raises(ConfigError, match=r"0\.01 leaves the global pool"):
        layout(0.01, kv_partition="static")
    with pytest.raises(ConfigError, match="--kv-partition static"):
        layout(0.5)


def test_memory_must_be_told() -> None:
    with pytest.raises(ConfigError, match="kv_cache_memory is not set"):
        simulated_layout(EngineConfig(max_model_len=1024), GEMMA)
