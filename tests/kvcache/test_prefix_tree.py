"""The tree of cached prefixes: what a lost block takes with it, which tails are whole, and what is kept."""

from __future__ import annotations

from typing import Any

import pytest

from hkv_jax.kvcache.block_table import HOLE
from hkv_jax.kvcache.layout import plan_layout
from hkv_jax.kvcache.prefix_tree import Node
from hkv_jax.testing.cache_layouts import tiny_group, tiny_layout_request
from hkv_jax.testing.planted_prefixes import PlantedPrefixes

GLOBAL, SLIDING = 0, 1


def make(**changes: Any) -> PlantedPrefixes:
    """Nodes of 8 tokens: one global block and two of a window of 16 tokens, unless changed."""
    return PlantedPrefixes(plan_layout(tiny_layout_request(**changes)))


def make_window(window: int, block_size: int, node_size: int = 32, with_global: bool = True) -> PlantedPrefixes:
    groups = (tiny_group(None), tiny_group(window)) if with_global else (tiny_group(window),)
    sizes = {"global": node_size, "sliding": block_size} if with_global else {"sliding": block_size}
    return make(groups=groups, block_sizes=sizes, budget_bytes=2**21, max_model_len=512, expected_average_seq_length=16)


def test_prefixes_that_agree_share_their_nodes() -> None:
    planted = make()
    inserted: list[bytes] = []
    planted.tree.on_insert = inserted.append
    first, second = planted.plant("abc"), planted.plant("abd")
    assert first.parent is second.parent is planted.find("ab")
    assert (first.end, len(planted.tree)) == (24, 4)
    assert inserted == [b"a", b"ab", b"abc", b"abd"]
    assert planted.find("b") is None
    planted.tree.check_invariants()


def test_a_lost_global_block_takes_all_that_follows_along() -> None:
    planted = make()
    gone: list[bytes] = []
    nodes = {name: planted.plant(name) for name in ("a", "ab", "abc", "abcd", "abe", "ax")}
    planted.tree.on_change = lambda node: gone.append(node.digest)
    planted.forget(GLOBAL, nodes["ab"].blocks[GLOBAL][0])
    assert sorted(gone) == [b"ab", b"abc", b"abcd", b"abe"]
    assert {name for name, node in nodes.items() if node.alive} == {"a", "ax"}
    assert [planted.find(name) is not None for name in nodes] == [True, False, False, False, False, True]
    assert list(nodes["a"].children) == [b"ax"]
    pools = [cache.pool for cache in planted.groups]
    assert [pool.num_loose for pool in pools] == [2, 4], "blocks of lost nodes still have names"
    planted.tree.check_invariants()
    planted.plant("abc")
    planted.tree.check_invariants()


def test_a_lost_sliding_block_costs_only_the_tails_it_is_in() -> None:
    planted = make()
    nodes = [planted.plant("abcdef"[:end]) for end in range(1, 7)]
    planted.forget(SLIDING, nodes[2].blocks[SLIDING][0])
    # It held tokens 16 to 19. Position 32 needs 17 and later, position 40 needs 25 and later.
    assert [planted.tree.tail(node) is not None for node in nodes] == [True, True, False, False, True, True]
    assert [planted.tree.ends_whole(node) for node in nodes] == [True] * 6
    planted.forget(SLIDING, nodes[5].blocks[SLIDING][1])
    assert not planted.tree.ends_whole(nodes[5])
    assert all(node.alive for node in nodes)
    planted.tree.check_invariants()


@pytest.mark.parametrize("window", [1, 2, 4, 5, 16, 17, 33, 70])
@pytest.mark.parametrize("block_size", [1, 4, 16, 32])
def test_a_tail_is_what_the_next_token_can_see(window: int, block_size: int) -> None:
    planted = make_window(window, block_size)
    nodes = [planted.plant("abcde"[:end]) for end in range(1, 6)]
    everything = [block for node in nodes for block in node.blocks[SLIDING]]
    for node in nodes:
        first = max(0, node.end - window + 1) // block_size
        tail = everything[first : node.end // block_size]
        assert planted.tree.tail(node) == [tail]
    last = nodes[-1]
    first = (last.end - window + 1) // block_size
    if first:
        planted.forget(SLIDING, everything[first - 1])
        assert planted.tree.tail(last) is not None
    if window > 1:
        planted.forget(SLIDING, everything[first])
        assert planted.tree.tail(last) is None


def test_tails_of_several_windows_are_whole_together() -> None:
    spec = tiny_group(16)
    wide = type(spec)("sliding_w24", spec.kind, 24, 1, 8, spec.layers)
    narrow = type(spec)("sliding_w6", spec.kind, 6, 1, 8, spec.layers)
    planted = make(groups=(tiny_group(None), wide, narrow), block_sizes={"global": 8, "sliding": 4})
    node = planted.plant("abcd")
    tail = planted.tree.tail(node)
    assert tail is not None
    assert [len(blocks) for blocks in tail] == [6, 2]
    planted.forget(2, tail[1][0])
    assert planted.tree.tail(node) is None


def test_what_join_points_need_is_kept_once() -> None:
    planted = make()
    tree, pool = planted.tree, planted.groups[GLOBAL].pool
    long, other = planted.plant("abc"), planted.plant("abd")
    tree.need(long)
    tree.need(other)
    shared = planted.plant("ab")
    blocks = {name: planted.plant(name).blocks[GLOBAL][0] for name in ("a", "ab", "abc", "abd")}
    assert [pool.keeps(block) for block in blocks.values()] == [1, 1, 1, 1]
    assert (planted.plant("a").need, shared.need, long.need) == (1, 2, 1)
    tree.need(shared)
    tree.release(long)
    assert [pool.keeps(block) for block in blocks.values()] == [1, 1, 0, 1]
    tree.release(other)
    assert [pool.keeps(block) for block in blocks.values()] == [1, 1, 0, 0]
    tree.release(shared)
    assert pool.num_cached == 0
    assert pool.num_loose == 4


def test_where_nothing_attends_to_everything_a_node_lives_while_anything_is_found_by_it() -> None:
    planted = make_window(16, 4, with_global=False, node_size=4)
    nodes = [planted.plant("abcdefgh"[:end]) for end in range(1, 9)]
    tree = planted.tree
    for node in nodes[:4]:
        planted.forget(0, node.blocks[0][0])
    assert all(node.alive for node in nodes), "later nodes are found through their own digests"
    assert tree.tail(nodes[7]) is not None
    assert tree.tail(nodes[6]) is None
    assert tree.find(b"abcdefgh") is nodes[7]
    for node in reversed(nodes[4:]):
        planted.forget(0, node.blocks[0][0])
    assert not any(node.alive for node in nodes)
    assert len(tree) == 0
    tree.check_invariants()


def test_a_pinned_node_stays_without_its_blocks() -> None:
    planted = make_window(16, 4, with_global=False, node_size=4)
    node = planted.plant("ab")
    planted.tree.pin(node)
    for each in (node, node.parent):
        assert each is not None
        planted.forget(0, each.blocks[0][0])
    assert planted.find("ab") is node
    assert planted.find("a") is node.parent
    planted.tree.unpin(node)
    assert not node.alive
    assert len(planted.tree) == 0
    planted.tree.check_invariants()


def test_a_block_that_moved_is_listed_where_it_is_now() -> None:
    planted = make()
    node = planted.plant("ab")
    source = node.blocks[SLIDING][1]
    pool = planted.groups[SLIDING].pool
    pool.retain([source])
    (target,) = pool.allocate(1) or [HOLE]
    planted.tree.rename(SLIDING, source, target)
    pool.name(target)
    pool.release([target])
    pool.unname(source)
    pool.release([source])
    assert node.blocks[SLIDING][1] == target
    assert planted.tree.tail(node) is not None
    planted.tree.check_invariants()


def test_clearing_leaves_no_name() -> None:
    planted = make()
    nodes = [planted.plant(name) for name in ("abc", "abd", "x")]
    planted.tree.clear()
    assert len(planted.tree) == 0
    assert not any(node.alive for node in nodes)
    assert [cache.pool.num_loose for cache in planted.groups] == [0, 0]
    assert planted.tree.root.children == {}
    planted.tree.check_invariants()


def unname(planted: PlantedPrefixes, node: Node) -> None:
    planted.groups[GLOBAL].pool.unname(node.blocks[GLOBAL][0])


def need_too_much(planted: PlantedPrefixes, node: Node) -> None:
    node.need += 1


def lose_an_owner(planted: PlantedPrefixes, node: Node) -> None:
    node.blocks[SLIDING][0] = HOLE


@pytest.mark.parametrize(("fault", "broken"), [(unname, "X1"), (need_too_much, "X3"), (lose_an_owner, "X1")])
def test_a_broken_tree_is_noticed(fault: Any, broken: str) -> None:
    planted = make()
    node = planted.plant("ab")
    planted.tree.check_invariants()
    fault(planted, node)
    with pytest.raises(AssertionError, match=broken):
        planted.tree.check_invariants()


def test_one_place_lists_one_block() -> None:
    planted = make()
    node = planted.plant("a")
    block = (planted.groups[GLOBAL].pool.allocate(1) or [HOLE])[0]
    with pytest.raises(AssertionError, match="X1: a node lists two blocks"):
        planted.tree.name(node, GLOBAL, 0, block)
