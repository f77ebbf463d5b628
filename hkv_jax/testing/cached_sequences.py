"""Sequences run against a cache manager without a scheduler, for tests of what they leave behind and find again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hkv_jax.kvcache.join_point import JoinKind
from hkv_jax.kvcache.layout import KVLayout
from hkv_jax.kvcache.manager import CacheManager
from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.kvcache.prefix_match import PrefixPath, PrefixUse
from hkv_jax.kvcache.token_chain import TokenChain


class CachedSequences:
    """Lanes that run given tokens; ``ends`` is how far each has come."""

    def __init__(self, layout: KVLayout, policy: CachePolicy | None = None, num_lanes: int = 6) -> None:
        """A cache without a sequence."""
        self.cache = CacheManager(layout, num_lanes, policy)
        self.prefixes = self.cache.prefixes
        self.ends: dict[int, int] = {}
        self._chains: dict[int, TokenChain] = {}

    def path(self, tokens: Sequence[int]) -> PrefixPath:
        """Of a prompt, the last token of which is always computed."""
        chain = TokenChain(self.cache.layout.largest_block_size)
        chain.append(np.array(tokens, np.int32))
        return PrefixPath(chain, (len(tokens) - 1) // chain.block_size)

    def use_of(self, tokens: Sequence[int]) -> PrefixUse:
        """How a prompt would begin now."""
        return self.prefixes.choose(self.path(tokens))

    def open(self, lane: int, tokens: Sequence[int]) -> PrefixUse:
        """Begins a sequence with whatever is cached of it."""
        path = self.path(tokens)
        use = self.prefixes.choose(path)
        self.cache.open(lane, path, use)
        self._chains[lane], self.ends[lane] = path.chain, use.start
        return use

    def run(self, lane: int, end: int, joins: Mapping[int, JoinKind] | None = None) -> None:
        """One chunk, up to ``end``; join points are left at ``joins``."""
        joins = joins or {}
        keep_from = min(joins, default=end)
        assert self.cache.extend(lane, self.ends[lane], end, keep_from), "no room for the chunk"
        self.cache.record(lane, self._chains[lane], end, joins)
        self.ends[lane] = end
        self.check()

    def close(self, lane: int) -> None:
        """The sequence ends where it is."""
        self.cache.close(lane, self._chains.pop(lane), self.ends.pop(lane))
        self.check()

    def leave(self, tokens: Sequence[int], chunk: int = 32) -> None:
        """A sequence runs and ends; what it leaves is a join point at its end."""
        lane = next(lane for lane in range(len(self.cache.watermarks)) if lane not in self.ends)
        use = self.open(lane, tokens)
        for start in range(use.start, len(tokens), chunk):
            self.run(lane, min(len(tokens), start + chunk))
        self.close(lane)

    def ids(self, group: int, lane: int) -> list[int]:
        """Block ids in the lane's table, holes included."""
        return list(self.cache._groups[group].tables[lane].ids)

    def evict_all(self) -> None:
        """Evicts whatever can be: more is wanted than there is."""
        assert not self.cache._boundary.make_room([2**31] * len(self.cache.layout.groups))
        self.check()

    def used(self) -> list[int]:
        """Held blocks by group."""
        return [pool.used_blocks for pool in self.cache.stats()]

    def check(self) -> None:
        """Asserts the cache's invariants."""
        self.cache.check_invariants()


def lose_tails(cache: CacheManager) -> None:
    """No join point is left, and what free sliding blocks held is overwritten; global blocks can still be found."""
    for join in list(cache.prefixes.joins.living):
        cache.prefixes.joins.remove(join)
    for group in cache.prefixes.tree.sliding:
        pool = cache._groups[group].pool
        pool.release(pool.allocate(pool.num_free) or [])
    cache.check_invariants()
