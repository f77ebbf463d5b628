"""Whether one more sequence can be admitted without anybody being preempted for it soon.

Owns: the estimate of what a new sequence and those that run will take. Must never: take or evict a block; the answer is
a forecast, and whoever acts on it still asks ``CacheManager.extend``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from hkv_jax.kvcache.boundary import Boundary
from hkv_jax.kvcache.group_cache import GroupCache
from hkv_jax.kvcache.layout import most_window_blocks
from hkv_jax.kvcache.prefix_cache import PrefixCache
from hkv_jax.kvcache.prefix_match import PrefixPath, PrefixUse

GROWTH_TOKENS = 256
"""Tokens a running sequence is assumed to draw yet when the next is admitted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Demand:
    """What a sequence will take; all but ``path`` and ``use`` (its cached prefix, if it has any) in tokens.

    Attributes:
        num_tokens: tokens it knows.
        max_tokens: tokens it has when length ends it.
        chunk_end: where its first chunk ends, which begins at ``use.start``.
        keep_from: the first position of that chunk before which the window is to stay.
    """

    num_tokens: int
    max_tokens: int
    chunk_end: int
    keep_from: int
    path: PrefixPath
    use: PrefixUse


class Room:
    """A forecast over all groups of one ``CacheManager``."""

    def __init__(self, groups: list[GroupCache], boundary: Boundary, prefixes: PrefixCache) -> None:
        self._groups, self._boundary, self._prefixes = groups, boundary, prefixes

    def promised(
        self, prefilling: Iterable[tuple[int, int]], positions: NDArray[np.int32], limits: NDArray[np.int32]
    ) -> list[int]:
        """Blocks by group that running sequences will still take.

        Args:
            prefilling: (lane, known tokens) of those that have not computed what they know.
            positions: i32[running], where each is in its sequence, or will be when its prompt is computed.
            limits: i32[running], where it ends at the latest.
        """
        lanes = list(prefilling)
        promised = []
        for group in self._groups:
            growth = np.minimum(limits - positions, GROWTH_TOKENS)
            if group.window is not None:
                # Once its window is full a sequence gives a block back for each it takes.
                growth = np.clip(group.window + group.block_size - positions, 0, growth)
            blocks = int(np.sum(-(-growth // group.block_size)))
            promised.append(blocks + sum(_outstanding(group, lane, num_tokens) for lane, num_tokens in lanes))
        return promised

    def fits(self, demand: Demand, promised: Sequence[int]) -> bool:
        """Whether a sequence could be admitted and go on, if everything idle were evicted.

        ``promised`` are blocks by group that running sequences will still take.
        """
        loaded = self._prefixes.loaded_blocks(demand.path, demand.use)
        extra = []
        for group, blocks, others in zip(self._groups, loaded, promised, strict=True):
            # Cached blocks that a running sequence holds cost nothing; the rest are as good as new ones.
            idle = sum(not group.pool.references(block) for block in blocks)
            extra.append(idle + others + _needed(group, demand, len(blocks)))
        return self._boundary.could_hold(extra)


def _needed(group: GroupCache, demand: Demand, num_loaded: int) -> int:
    """Blocks a sequence takes beside its ``num_loaded`` cached ones, until it has drawn some tokens."""
    size = group.block_size
    growth = min(GROWTH_TOKENS, demand.max_tokens - demand.num_tokens)
    if group.window is None:
        return -(-(demand.num_tokens + growth) // size) - num_loaded
    first_kept = group.first_live(min(demand.keep_from, demand.chunk_end))
    chunk_blocks = -(-demand.chunk_end // size) - max(demand.use.start // size, first_kept)
    if demand.chunk_end < demand.num_tokens:
        # While the next chunk runs, the window before it is held as well.
        return chunk_blocks + _window_blocks(group)
    growth = min(growth, max(0, group.window + size - demand.num_tokens))
    return chunk_blocks + -(-growth // size)


def _outstanding(group: GroupCache, lane: int, num_tokens: int) -> int:
    """Blocks a lane will still take for the tokens it knows."""
    missing = -(-num_tokens // group.block_size) - group.tables[lane].capacity // group.block_size
    if group.window is not None:
        missing = min(missing, _window_blocks(group))
    return max(0, missing)


def _window_blocks(group: GroupCache) -> int:
    """Blocks that cover a window, wherever it starts in a block."""
    assert group.window is not None
    return most_window_blocks(group.window, group.block_size, 1)
