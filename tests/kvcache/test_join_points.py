"""Join points: what each keeps, what evicting one frees and leaves, and in which order they go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hkv_jax.kvcache.join_point import JoinKind, JoinPoint, Stake
from hkv_jax.kvcache.join_points import JoinPoints
from hkv_jax.kvcache.layout import plan_layout
from hkv_jax.testing.cache_layouts import tiny_group, tiny_layout_request
from hkv_jax.testing.planted_prefixes import PlantedPrefixes

GLOBAL, SLIDING = 0, 1
ALL_GLOBAL: dict[str, Any] = {"groups": (tiny_group(None),), "block_sizes": {"global": 8}}
ALL_SLIDING: dict[str, Any] = {"groups": (tiny_group(16),), "block_sizes": {"sliding": 4}}


class OldestFirst:
    """Least recently used, whatever it is worth."""

    def key(self, join: JoinPoint, stake: Stake) -> float:
        return join.interest.since

    def chance(self, kind: JoinKind, num_uses: int) -> float:
        return 0.5

    def note_made(self, kind: JoinKind, num_uses: int) -> None:
        pass

    def note_used(self, kind: JoinKind, num_uses: int) -> None:
        pass


class Grove(PlantedPrefixes):
    """Planted prefixes with join points over them.

    A node has 8 tokens; a tail before a node's end is 4 blocks of 4 tokens: those of the node and of the one before.
    """

    def __init__(self, rebuild_tokens: int | None = None, **changes: Any) -> None:
        super().__init__(plan_layout(tiny_layout_request(**changes)))
        self.joins = JoinPoints(self.tree, self.groups, OldestFirst(), rebuild_tokens)
        self.now = 0.0

    def join(self, name: str, kind: JoinKind = JoinKind.TURN) -> JoinPoint:
        """A join point at the end of a prefix, younger than all before."""
        self.now += 1
        join = self.joins.create(self.plant(name), kind, self.now)
        assert join is not None
        return join

    def evict(self) -> bool:
        return self.joins.evict()

    def kept(self, name: str) -> list[list[int]]:
        """By group, how often each block of the prefix's last node is kept."""
        blocks = self._node(name).blocks
        return [[cache.pool.keeps(b) for b in ids] for cache, ids in zip(self.groups, blocks, strict=True)]

    def num_cached(self) -> list[int]:
        self.tree.check_invariants()
        self.joins.check_invariants()
        for cache in self.groups:
            cache.pool.check_invariants()
        return [cache.pool.num_cached for cache in self.groups]

    def living(self) -> set[str]:
        return {join.node.digest.decode() for join in self.joins.living}


def test_a_join_point_keeps_its_tail_and_all_global_blocks_before_it() -> None:
    grove = Grove()
    join = grove.join("abcd")
    assert grove.num_cached() == [4, 4]
    assert [grove.kept(name) for name in ("a", "ab", "abc", "abcd")] == [[[1], [0, 0]]] * 2 + [[[1], [1, 1]]] * 2
    size = [group.layout.format.block_bytes for group in grove.groups]
    assert grove.joins.stake(join) == Stake(32, 4 * size[GLOBAL] + 4 * size[SLIDING])
    assert grove.evict()
    assert grove.num_cached() == [0, 0]
    assert not join.alive
    assert grove.joins.num_evicted == 1
    assert not grove.evict()


def test_what_two_share_counts_in_part_and_stays_for_the_other() -> None:
    grove = Grove()
    lower, upper = grove.join("abc"), grove.join("abcd")
    everywhere, window = [group.layout.format.block_bytes for group in grove.groups]
    assert grove.kept("abc") == [[1], [2, 2]]
    # Only the upper one needs the global block of its last node; all others they need both.
    assert grove.joins.stake(lower) == Stake(24, 2 * window + 2 * window / 2)
    assert grove.joins.stake(upper) == Stake(8, everywhere + 2 * window + 2 * window / 2)
    assert grove.evict()
    assert grove.living() == {"abcd"}
    assert grove.kept("abc") == [[1], [1, 1]]
    assert grove.num_cached() == [4, 4]
    assert grove.joins.stake(upper) == Stake(32, 4 * everywhere + 4 * window)


def test_evicting_the_upper_one_leaves_the_lower_one_whole() -> None:
    grove = Grove()
    upper, lower = grove.join("abcd"), grove.join("abc")
    assert grove.evict()
    assert not upper.alive
    assert lower.alive
    assert grove.num_cached() == [3, 4]
    assert grove.kept("abcd") == [[0], [0, 0]]


def test_what_sequences_hold_is_never_freed_and_counts_for_nothing() -> None:
    grove = Grove()
    join = grove.join("ab")
    for name in ("a", "ab"):
        grove.hold(name)
    assert grove.joins.stake(join).num_bytes == 0
    assert not grove.evict()
    assert join.alive
    grove.let_go("ab")
    window = grove.groups[SLIDING].layout.format.block_bytes
    # What the other holds stays: the last node and half of the tail would come free.
    assert grove.joins.stake(join).num_bytes == grove.groups[GLOBAL].layout.format.block_bytes + 2 * window
    assert not grove.evict(), "nobody said that blocks came free"
    grove.joins.released = True
    assert grove.evict()
    assert grove.num_cached() == [0, 0]
    assert grove.groups[GLOBAL].pool.num_held == 1


def test_the_one_that_is_worth_least_goes_first_and_use_makes_it_worth_more() -> None:
    grove = Grove()
    first = grove.join("ab", JoinKind.RUNNING)
    for name in ("cd", "ef", "gh"):
        grove.join(name)
    grove.joins.use(first.node, 10.0)
    assert first.kind is JoinKind.TURN, "somebody has joined: it outlives its sequence"
    order = []
    while grove.evict():
        order.append(grove.living())
    assert order == [{"ab", "ef", "gh"}, {"ab", "gh"}, {"ab"}, set()]
    assert grove.num_cached() == [0, 0]


def test_there_is_one_at_a_place_and_its_kind_only_rises() -> None:
    grove = Grove()
    join = grove.join("ab", JoinKind.BEFORE_END)
    kinds = []
    for kind in (JoinKind.RUNNING, JoinKind.BRANCH, JoinKind.TURN):
        assert grove.join("ab", kind) is join
        kinds.append(join.kind)
    assert kinds == [JoinKind.BEFORE_END, JoinKind.BRANCH, JoinKind.BRANCH]
    assert grove.num_cached() == [2, 4]
    grove.joins.remove(join)
    grove.joins.remove(join)
    assert grove.num_cached() == [0, 0]
    assert grove.living() == set()


def test_where_the_tail_is_not_whole_there_is_none() -> None:
    grove = Grove()
    node = grove.plant("abc")
    grove.forget(SLIDING, node.blocks[SLIDING][0])
    assert grove.joins.create(node, JoinKind.TURN, 1.0) is None
    assert grove.num_cached() == [0, 0]


def kept_globals(grove: Grove, name: str) -> str:
    """The nodes of a prefix whose global blocks are kept."""
    return "".join(
        name[end - 1]
        for end in range(1, len(name) + 1)
        if (node := grove.find(name[:end])) and grove.groups[0].pool.keeps(node.blocks[0][0])
    )


def test_global_blocks_without_a_tail_go_leaf_first_while_a_rebuild_from_them_pays() -> None:
    grove = Grove(rebuild_tokens=10)
    grove.join("abcdef")
    left = []
    while grove.evict():
        assert grove.num_cached()[SLIDING] == 0
        left.append(kept_globals(grove, "abcdef"))
    # "a" is 8 tokens: starting 10 before its end saves nothing.
    assert left == ["abcdef", "abcde", "abcd", "abc", "ab", ""]


def test_what_is_left_of_a_prefix_ends_at_the_next_join_point() -> None:
    grove = Grove(rebuild_tokens=10)
    grove.join("abcdef")
    grove.join("abc")
    grove.hold("abc")
    grove.hold("ab")
    left = []
    while grove.evict():
        grove.num_cached()
        left.append(kept_globals(grove, "abcdef"))
        if len(left) == 4:
            break
    # From "abcd" on a rebuild would begin below the end of "abc".
    assert left[:3] == ["abcdef", "abcde", "abc"]


def test_a_shared_stem_stays_until_the_last_branch_is_gone() -> None:
    grove = Grove(rebuild_tokens=10)
    grove.join("abcd")
    grove.join("abxy")
    seen = []
    while grove.evict():
        grove.num_cached()
        seen.append((kept_globals(grove, "abcd"), kept_globals(grove, "abxy")))
    assert seen[-1] == ("", "")
    for first, second in seen[:-1]:
        longest = max(first, second, key=len)
        assert len(longest) < 3 or first[:2] == second[:2] == "ab"


def test_a_tail_that_is_whole_again_takes_the_place_of_the_rest() -> None:
    grove = Grove(rebuild_tokens=10)
    rest = grove.join("abcd")
    assert grove.evict()
    assert not rest.alive
    assert grove.num_cached() == [4, 0]
    grove.join("abcd")
    assert grove.num_cached() == [4, 4]
    assert len(grove.joins.living) == 1


def test_a_rest_is_left_where_it_saves_work_and_nowhere_else() -> None:
    grove = Grove(rebuild_tokens=16)
    assert grove.joins.leave_rest(grove.plant("ab"), 1.0) is None
    assert grove.joins.leave_rest(grove.plant("abc"), 1.0) is not None
    assert grove.num_cached() == [3, 0]
    assert Grove(rebuild_tokens=None).joins.leave_rest(Grove().plant("abcdefgh"), 1.0) is None


def test_where_all_layers_see_everything_prefixes_go_block_by_block_from_the_end() -> None:
    grove = Grove(rebuild_tokens=0, **ALL_GLOBAL)
    grove.join("abc")
    grove.join("abxy")
    left = []
    while grove.evict():
        grove.num_cached()
        left.append((kept_globals(grove, "abc"), kept_globals(grove, "abxy")))
    assert left[-1] == ("", "")
    assert all(whole.startswith(one) for pair in left for whole, one in zip(("abc", "abxy"), pair, strict=True))
    assert sum(len({*map(frozenset, enumerate_blocks(pair))}) for pair in left) == sum(range(len(left)))


def enumerate_blocks(pair: tuple[str, str]) -> list[str]:
    """The kept nodes of both prefixes, each once, by name."""
    return sorted({name[:end] for name in pair for end in range(1, len(name) + 1)})


def test_where_no_layer_sees_everything_a_tail_stands_alone() -> None:
    grove = Grove(**ALL_SLIDING)
    grove.join("abcdefgh")
    assert grove.num_cached() == [4]
    assert grove.evict()
    assert grove.num_cached() == [0]
    assert not grove.evict()


@pytest.mark.parametrize("changes", [{}, ALL_GLOBAL, ALL_SLIDING], ids=["hybrid", "all global", "all sliding"])
@pytest.mark.parametrize("seed", range(4))
def test_in_any_order_nothing_held_is_evicted_and_nothing_stays_behind(changes: dict[str, Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rebuild = 0 if changes is ALL_GLOBAL else None if changes is ALL_SLIDING else 10
    grove = Grove(rebuild, budget_bytes=2**19, expected_average_seq_length=16, **changes)
    held: list[str] = []
    for _ in range(150):
        name = "".join(rng.choice(list("ab"), int(rng.integers(1, 6))))
        act = rng.random()
        if act < 0.4:
            grove.plant(name)
            grove.joins.create(grove.plant(name), JoinKind(rng.choice(["turn", "branch", "running"])), grove.now)
            grove.now += 1
        elif act < 0.6 and grove.find(name) is not None:
            grove.hold(name)
            held.append(name)
        elif act < 0.75 and held:
            grove.let_go(held.pop(int(rng.integers(len(held)))))
            grove.joins.released = True
        elif grove.joins.living:
            before = [(g, b) for name in held for g, blocks in enumerate(grove.blocks_of(name)) for b in blocks]
            free = sum(cache.pool.num_free for cache in grove.groups)
            if grove.evict():
                assert sum(cache.pool.num_free for cache in grove.groups) >= free
            assert all(grove.groups[g].pool.references(block) for g, block in before)
        grove.num_cached()
    for name in held:
        grove.let_go(name)
    grove.joins.released = True
    while grove.evict():
        pass
    assert set(grove.num_cached()) == {0}
    assert not grove.joins.living
