"""The forecast by which sequences are admitted: what it counts, and that it is kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from hkv_jax.kvcache.layout import plan_layout
from hkv_jax.kvcache.manager import CacheManager
from hkv_jax.kvcache.prefix_match import NO_PREFIX, PrefixPath
from hkv_jax.kvcache.room import GROWTH_TOKENS, Demand
from hkv_jax.kvcache.token_chain import TokenChain
from hkv_jax.testing.cache_layouts import tiny_layout_request

NO_PATH = PrefixPath(TokenChain(1), 0)


def make(num_lanes: int, **changes: Any) -> CacheManager:
    return CacheManager(plan_layout(tiny_layout_request(**changes)), num_lanes)


def demand(num_tokens: int, chunk_end: int | None = None) -> Demand:
    """Of a sequence whose first chunk ends at ``chunk_end``, else with what it knows; it leaves no tails."""
    end = num_tokens if chunk_end is None else chunk_end
    return Demand(num_tokens, num_tokens, chunk_end=end, keep_from=end, path=NO_PATH, use=NO_PREFIX)


def growing(what: Demand, growth: int) -> Demand:
    return dataclasses.replace(what, max_tokens=what.num_tokens + growth)


def fits(cache: CacheManager, what: Demand) -> bool:
    return cache.room.fits(what, [0] * len(cache.layout.groups))


def test_room_is_what_is_free_less_what_is_promised() -> None:
    cache = make(2, budget_bytes=22_000, expected_average_seq_length=16, partition="static")
    assert fits(cache, demand(128))
    cache.open(0)
    assert cache.extend(0, 0, 40)
    everything, window = cache.stats()
    free_tokens = 8 * (everything.num_blocks - everything.used_blocks)
    assert free_tokens < 128
    assert window.num_blocks - window.used_blocks >= 10
    assert fits(cache, demand(free_tokens, 32))
    assert not fits(cache, demand(free_tokens + 1, 32))
    assert not cache.room.fits(demand(free_tokens, 32), [1, 0])
    assert fits(cache, growing(demand(free_tokens - 9, 32), 9))
    assert not fits(cache, growing(demand(free_tokens), 1))


def test_growth_is_expected_so_far_and_no_farther() -> None:
    cache = make(2, budget_bytes=80_000, max_model_len=1024)
    blocks = cache.stats()[0].num_blocks
    known = 8 * blocks - GROWTH_TOKENS
    assert fits(cache, growing(demand(known, 32), GROWTH_TOKENS))
    assert fits(cache, growing(demand(known, 32), 10 * GROWTH_TOKENS))
    assert not fits(cache, growing(demand(known + 1, 32), GROWTH_TOKENS))


def test_a_running_sequence_is_promised_its_known_tokens_and_some_growth() -> None:
    cache = make(2, budget_bytes=80_000, max_model_len=1024)
    cache.open(0)
    assert cache.extend(0, 0, 8)
    positions, limits = np.array([40], np.int32), np.array([40 + 9], np.int32)
    everything, some = cache.room.promised([(0, 40)], positions, limits)
    assert everything == 4 + 2  # 32 tokens it knows, then 9 of a block size of 8
    assert 0 < some <= everything
    # Past its window a sequence gives a block back for each it takes.
    assert cache.room.promised([], positions, limits) == [2, 0]
    assert cache.room.promised([], positions, limits + 10 * GROWTH_TOKENS)[0] == GROWTH_TOKENS // 8


@pytest.mark.parametrize("partition", ["moving", "static"])
@pytest.mark.parametrize("seed", range(6))
def test_whoever_is_said_to_fit_does(partition: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    answers = []
    for _ in range(25):
        cache = make(
            6, budget_bytes=30_000, expected_average_seq_length=int(rng.choice([16, 128])), partition=partition
        )
        for lane in range(5):
            cache.open(lane)
            for start in range(0, int(rng.integers(1, 100)), 24):
                if not cache.extend(lane, start, start + 24):
                    break
        for lane in rng.permutation(5)[: int(rng.integers(0, 4))]:
            cache.close(int(lane))
        num_tokens, chunk = int(rng.integers(1, 129)), int(rng.choice([8, 16, 32]))
        answers.append(fits(cache, demand(num_tokens, min(chunk, num_tokens))))
        if answers[-1]:
            cache.open(5)
            for start in range(0, num_tokens, chunk):
                assert cache.extend(5, start, min(num_tokens, start + chunk))
        cache.check_invariants()
    assert any(answers)
    assert not all(answers)
