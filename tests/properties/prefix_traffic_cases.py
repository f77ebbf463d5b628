"""Engines too small for their traffic, and the run that each must stand.

Owns: the configurations, and what their traffic must meet if it is to show anything. Must never: change an engine.
"""

from __future__ import annotations

import dataclasses

from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.outputs import PrefixHit
from hkv_jax.spec import KVGroupSpec, LayerKind
from hkv_jax.testing.fake_engine import FakeEngineConfig
from hkv_jax.testing.prefix_traffic import PrefixTraffic

STEPS = 10_000
"""Of each of ten configurations."""

ALL_HITS = frozenset(PrefixHit)


def everywhere(*layers: int) -> KVGroupSpec:
    return KVGroupSpec("global", LayerKind.GLOBAL, None, 1, 8, layers)


def sliding(window: int, *layers: int, name: str = "sliding") -> KVGroupSpec:
    return KVGroupSpec(name, LayerKind.SLIDING, window, 2, 8, layers)


# Three sliding layers of window 5 over blocks of 4: R is 12 tokens.
BASE = FakeEngineConfig(
    groups=(everywhere(2), sliding(5, 0, 1, 3)),
    block_size=(("global", 4), ("sliding", 4)),
    kv_cache_memory=30 * 1024,
    max_model_len=96,
    vocab_size=23,
    max_num_seqs=6,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration, and what its traffic must meet if it is to show anything."""

    config: FakeEngineConfig
    hits: frozenset[PrefixHit] = ALL_HITS
    policy: CachePolicy = dataclasses.field(default_factory=CachePolicy)
    preempts: bool = False
    moves: bool = True


NO_REBUILD = frozenset({PrefixHit.MISS, PrefixHit.RESIDENT, PrefixHit.TRUNCATE})
WITHOUT_A_PART = frozenset({PrefixHit.MISS, PrefixHit.RESIDENT})

POOLS = {
    "tiny pools": Case(BASE, preempts=True),
    "roomier pools": Case(dataclasses.replace(BASE, kv_cache_memory=100 * 1024)),
    "many lanes": Case(dataclasses.replace(BASE, max_num_seqs=12, kv_cache_memory=36 * 1024), preempts=True),
    "small chunks": Case(dataclasses.replace(BASE, max_prefill_chunk=7, max_num_batched_tokens=11), preempts=True),
    "two arenas": Case(dataclasses.replace(BASE, kv_partition="static", kv_cache_memory=40 * 1024), moves=False),
}
"""The layers of ``BASE`` with other memory, lanes and chunks."""

LAYOUTS = {
    "large global blocks": Case(
        dataclasses.replace(BASE, groups=(everywhere(2), sliding(10, 0, 1)), block_size=(("global", 8), ("sliding", 4)))
    ),
    "two windows": Case(
        dataclasses.replace(
            BASE,
            groups=(everywhere(2, 5), sliding(5, 0, 3, name="sliding_w5"), sliding(9, 1, 4, name="sliding_w9")),
            block_size=(("global", 8), ("sliding", 4)),
            kv_cache_memory=56 * 1024,
        )
    ),
    "no repair": Case(BASE, NO_REBUILD, CachePolicy(tail_repair=False), preempts=True),
    "all global": Case(
        dataclasses.replace(BASE, groups=(everywhere(0, 1),)), WITHOUT_A_PART, preempts=True, moves=False
    ),
    "all sliding": Case(
        dataclasses.replace(BASE, groups=(sliding(5, 0, 1),), kv_cache_memory=20 * 1024), WITHOUT_A_PART, moves=False
    ),
}
"""Other layers and blocks, and a cache that repairs nothing."""

CASES = POOLS | LAYOUTS


def run_ten_thousand_steps(name: str) -> None:
    """Every invariant now and then, the counts after each step; then nothing may be left."""
    case = CASES[name]
    traffic = PrefixTraffic(case.config, seed=sorted(CASES).index(name), policy=case.policy)
    traffic.run(STEPS, full_check_every=100)
    traffic.drain()
    cache = traffic.engine.cache
    assert set(traffic.hits) == case.hits
    assert min(traffic.hits.values()) >= 10, traffic.hits
    assert traffic.num_compared >= 3
    assert cache.prefixes.joins.num_evicted > 100
    assert (cache.num_slabs_moved > 100) == case.moves
    assert traffic.engine.scheduler.num_preemptions > 0 or not case.preempts
