"""The figures of the engine are those of its parts."""

from __future__ import annotations

import random

from hkv_jax.engine.request import Request
from hkv_jax.engine.stats import EngineStats
from hkv_jax.outputs import PrefixHit
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.fake_engine import FakeEngineConfig, fake_engine


def test_a_busy_engine_with_too_little_memory() -> None:
    """Prompts and answers of all lengths, so that pools fragment and memory changes hands."""
    rng = random.Random(2)
    engine = fake_engine(FakeEngineConfig(kv_cache_memory=2**15, max_model_len=200, max_num_batched_tokens=64))
    num_wanted = 0
    for number in range(20):
        prompt = [rng.randrange(97) for _ in range(rng.choice([3, 8, 60, 120]))]
        max_tokens = rng.choice([5, 30, 60])
        num_wanted += max_tokens
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1)
        engine.add(Request.create(f"r{number}", prompt, params))
    stats = EngineStats.of(engine)
    assert stats == EngineStats(pools=engine.cache.stats())
    most_running = 0
    while engine.has_work:
        stats = stats.after_step(engine, len(engine.step()))
        most_running = max(most_running, stats.num_running)
    assert most_running > 1
    assert stats.num_output_tokens == num_wanted
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_slabs_moved == engine.cache.num_slabs_moved > 0
    assert stats.copied_bytes == engine.cache.copied_bytes > 0
    assert stats.num_preemptions == engine.scheduler.num_preemptions
    assert sum(stats.prefix.hits.values()) == 20
    assert stats.prefix.hits[PrefixHit.MISS] == 20
    assert all(pool.cached_blocks for pool in stats.pools)
