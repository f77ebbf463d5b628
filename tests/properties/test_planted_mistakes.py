"""Mistakes planted in the cache, each of which random traffic must show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from hkv_jax.engine.prefill import Prefill
from hkv_jax.engine.request import Sequence
from hkv_jax.kvcache import prefix_cache
from hkv_jax.kvcache.block_table import BlockTable
from hkv_jax.kvcache.group_cache import GroupCache
from hkv_jax.kvcache.prefix_cache import PrefixCache
from hkv_jax.kvcache.prefix_match import PrefixPath, PrefixUse
from hkv_jax.kvcache.prefix_tree import Node, PrefixTree
from hkv_jax.kvcache.receptive import receptive_tokens
from hkv_jax.kvcache.token_chain import TokenChain
from hkv_jax.outputs import PrefixHit
from hkv_jax.spec import KVGroupSpec
from hkv_jax.testing.prefix_traffic import PrefixTraffic, TrafficRates
from tests.properties.prefix_traffic_cases import BASE

pytestmark = pytest.mark.usefixtures("short_prompts")

Plant = Callable[[pytest.MonkeyPatch], None]


def digests_leave_out_a_token(patch: pytest.MonkeyPatch) -> None:
    """Prompts that differ in the last token of a block are taken for equal."""
    honest = TokenChain.append

    def append(self: TokenChain, tokens):  # type: ignore[no-untyped-def]
        tokens = tokens.copy()
        tokens[self.block_size - 1 :: self.block_size] = 0
        honest(self, tokens)

    patch.setattr(TokenChain, "append", append)


def a_hit_leaves_nothing_to_compute(patch: pytest.MonkeyPatch) -> None:
    honest = Prefill.of

    def of(sequence: Sequence, known_end: int, block_size: int) -> Prefill:
        made = honest(sequence, known_end, block_size)
        made.path.limit = known_end // block_size
        return made

    patch.setattr(Prefill, "of", of)


def a_hit_begins_a_block_late(patch: pytest.MonkeyPatch) -> None:
    honest = PrefixPath.choose

    def choose(self: PrefixPath, tree: PrefixTree, rebuild_tokens: int | None) -> PrefixUse:
        use = honest(self, tree, rebuild_tokens)
        if use.hit is PrefixHit.TRUNCATE and use.start + tree.block_size < use.matched:
            start = use.start + tree.block_size
            return dataclasses.replace(use, start=start, context_start=start)
        return use

    patch.setattr(PrefixPath, "choose", choose)


def a_tail_lacks_its_first_block(patch: pytest.MonkeyPatch) -> None:
    honest_tail, honest_live = PrefixTree.tail, GroupCache.first_live

    def tail(self: PrefixTree, node: Node) -> list[list[int]] | None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(GroupCache, "first_live", lambda cache, end: honest_live(cache, end) + 1)
            return honest_tail(self, node)

    patch.setattr(PrefixTree, "tail", tail)


def a_rebuild_begins_a_block_late(patch: pytest.MonkeyPatch) -> None:
    honest = receptive_tokens

    def receptive(groups: list[KVGroupSpec], sizes: list[int]) -> int | None:
        tokens = honest(groups, sizes)
        return None if tokens is None else tokens - max(sizes)

    patch.setattr(prefix_cache, "receptive_tokens", receptive)


def polluted_blocks_are_listed(patch: pytest.MonkeyPatch) -> None:
    honest = PrefixCache.attach

    def attach(self: PrefixCache, lane: int, path: PrefixPath | None, use: PrefixUse) -> None:
        honest(self, lane, path, use)
        self._lanes[lane].exact_blocks = [0] * len(self._groups)

    patch.setattr(PrefixCache, "attach", attach)


def the_block_before_the_exact_tail_is_listed(patch: pytest.MonkeyPatch) -> None:
    honest = PrefixCache.attach

    def attach(self: PrefixCache, lane: int, path: PrefixPath | None, use: PrefixUse) -> None:
        honest(self, lane, path, use)
        exact = self._lanes[lane].exact_blocks
        self._lanes[lane].exact_blocks = [max(0, first - 1) for first in exact]

    patch.setattr(PrefixCache, "attach", attach)


def the_window_is_released_a_block_early(patch: pytest.MonkeyPatch) -> None:
    honest = GroupCache.release_window
    patch.setattr(GroupCache, "release_window", lambda self, lane, start: honest(self, lane, start + self.block_size))


def the_window_is_a_token_short(patch: pytest.MonkeyPatch) -> None:
    honest = BlockTable.__init__
    patch.setattr(BlockTable, "__init__", lambda self, size, window: honest(self, size, window and window - 1))


def a_hit_is_not_pinned(patch: pytest.MonkeyPatch) -> None:
    honest = GroupCache.load

    def load(self: GroupCache, lane: int, start: int, blocks: list[int], cached_end: int) -> None:
        honest(self, lane, start, blocks, cached_end)
        self.pool.release(blocks)

    patch.setattr(GroupCache, "load", load)


def half_written_blocks_are_listed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockTable, "is_whole", lambda self, number: True)


def cached_blocks_are_written_again(patch: pytest.MonkeyPatch) -> None:
    honest = BlockTable.load
    patch.setattr(BlockTable, "load", lambda self, start, blocks, end: honest(self, start, blocks, 0))


SEEN = (
    "holds the K/V of something else|never set|polluted|what a hit would expect|is cached and|P2|not kept"
    "|does not follow"
)


@pytest.mark.parametrize(
    "plant",
    [
        digests_leave_out_a_token,
        a_hit_leaves_nothing_to_compute,
        a_hit_begins_a_block_late,
        a_tail_lacks_its_first_block,
        a_rebuild_begins_a_block_late,
        polluted_blocks_are_listed,
        the_block_before_the_exact_tail_is_listed,
        the_window_is_released_a_block_early,
        the_window_is_a_token_short,
        a_hit_is_not_pinned,
        half_written_blocks_are_listed,
        cached_blocks_are_written_again,
    ],
)
def test_a_planted_mistake_is_seen(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    # A budget that leaves a few tokens for the next prompt: its second chunk begins within a block.
    config = dataclasses.replace(BASE, max_num_seqs=12, max_num_batched_tokens=18, kv_cache_memory=40 * 1024)
    traffic = PrefixTraffic(config, seed=0, rates=TrafficRates(arrival=0.4))
    with pytest.raises((AssertionError, ValueError), match=SEEN):
        traffic.run(4_000, full_check_every=10)
