"""The line a server logs while it works."""

from __future__ import annotations

import dataclasses

from hkv_jax.engine.prefix_stats import PrefixStats
from hkv_jax.engine.stats import EngineStats
from hkv_jax.kvcache.manager import PoolStats
from hkv_jax.outputs import PrefixHit
from serving.activity import activity


def pool(name: str, num_blocks: int, used_blocks: int) -> PoolStats:
    return PoolStats(
        name=name,
        num_blocks=num_blocks,
        used_blocks=used_blocks,
        cached_blocks=1,
        peak_used_blocks=num_blocks,
        released_early_blocks=0,
        block_bytes=4096,
        block_size=16,
    )


BEFORE = EngineStats(
    num_output_tokens=1000,
    pools=(pool("global", 40, 10), pool("sliding", 8, 4)),
    prefix=PrefixStats({PrefixHit.MISS: 7, PrefixHit.RESIDENT: 1}, prompt_tokens=3000, prefix_hit_tokens=100),
)


def test_counts_are_those_since_the_line_before() -> None:
    prefix = PrefixStats(
        {PrefixHit.MISS: 8, PrefixHit.RESIDENT: 3, PrefixHit.REBUILD: 2}, prompt_tokens=3400, prefix_hit_tokens=400
    )
    now = dataclasses.replace(BEFORE, num_running=3, num_waiting=2, num_output_tokens=1055, prefix=prefix)
    assert activity(BEFORE, now, 10.0) == (
        "3 running, 2 waiting; 40.0 prompt and 5.5 output tokens/s; blocks in use: global 25%, sliding 50%; "
        "75% of prompt tokens were cached (1 miss, 2 resident, 2 rebuild)"
    )


def test_without_new_prompts_nothing_is_said_about_them() -> None:
    now = dataclasses.replace(BEFORE, num_running=1, num_output_tokens=1010)
    assert activity(BEFORE, now, 10.0) == (
        "1 running, 0 waiting; 0.0 prompt and 1.0 output tokens/s; blocks in use: global 25%, sliding 50%"
    )


def test_an_idle_server_is_silent_but_a_stuck_one_is_not() -> None:
    assert activity(BEFORE, BEFORE, 10.0) is None
    assert activity(BEFORE, dataclasses.replace(BEFORE, num_waiting=1), 10.0) is not None
