"""How far a prompt is cached, and where it therefore begins: hit, truncation, rebuild or miss."""

from __future__ import annotations

from typing import Any

import pytest

from hkv_jax.kvcache.join_point import JoinKind, JoinPoint
from hkv_jax.kvcache.layout import plan_layout
from hkv_jax.kvcache.prefix_match import NO_PREFIX, PrefixPath, PrefixUse
from hkv_jax.kvcache.token_chain import TokenChain
from hkv_jax.outputs import PrefixHit
from hkv_jax.testing.cache_layouts import tiny_group, tiny_layout_request
from hkv_jax.testing.planted_prefixes import PlantedPrefixes

SLIDING = 1
NAME = "abcdefgh"


def make(**changes: Any) -> PlantedPrefixes:
    """Nodes of 8 tokens; a tail is the 4 blocks of a node and of the one before."""
    return PlantedPrefixes(plan_layout(tiny_layout_request(**changes)))


def path_of(name: str, limit: int | None = None) -> PrefixPath:
    chain = TokenChain(8)
    chain.digests = [name[:end].encode() for end in range(1, len(name) + 1)]
    return PrefixPath(chain, len(name) if limit is None else limit)


def lose_tails(planted: PlantedPrefixes, *ends: int) -> None:
    """The last sliding block of these nodes (counted from 1) is taken for something else."""
    for end in ends:
        node = planted.find(NAME[:end])
        assert node is not None
        planted.forget(SLIDING, node.blocks[SLIDING][1])


def test_a_path_is_revised_rather_than_walked_again() -> None:
    planted, path = make(), path_of(NAME)
    path.refresh(planted.tree)
    assert (path.matched, path.next_digest) == (0, b"a")
    planted.plant("abc")
    path.refresh(planted.tree)
    assert (path.matched, path.next_digest) == (24, b"abcd")
    kept = path.nodes[0]
    node = planted.find("ab")
    assert node is not None
    planted.forget(0, node.blocks[0][0])
    path.refresh(planted.tree)
    assert (path.matched, path.next_digest) == (8, b"ab")
    assert path.nodes == [kept]
    planted.plant("abcde")
    path.refresh(planted.tree)
    assert path.matched == 40


def test_what_holds_the_last_token_is_not_matched() -> None:
    planted, path = make(), path_of(NAME, limit=3)
    planted.plant(NAME)
    path.refresh(planted.tree)
    assert (path.matched, path.next_digest) == (24, None)


@pytest.mark.parametrize(
    ("lost", "rebuild", "expected"),
    [
        ((), 20, PrefixUse(64, 64, PrefixHit.RESIDENT, 0)),
        ((), None, PrefixUse(64, 64, PrefixHit.RESIDENT, 0)),
        # The tail before 48 is the last that is whole; 20 tokens before 64 is 44, in whole blocks 40.
        ((7,), 20, PrefixUse(48, 64, PrefixHit.TRUNCATE, 0)),
        ((7,), None, PrefixUse(48, 64, PrefixHit.TRUNCATE, 0)),
        ((7,), 16, PrefixUse(48, 64, PrefixHit.TRUNCATE, 0)),
        ((7,), 15, PrefixUse(48, 64, PrefixHit.TRUNCATE, 0)),
        ((7,), 8, PrefixUse(56, 64, PrefixHit.REBUILD, 56)),
        ((3, 5, 7, 8), 20, PrefixUse(40, 64, PrefixHit.REBUILD, 40)),
        ((3, 5, 7, 8), 50, PrefixUse(16, 64, PrefixHit.TRUNCATE, 0)),
        ((1, 3, 5, 7, 8), 50, PrefixUse(8, 64, PrefixHit.REBUILD, 8)),
        ((1, 3, 5, 7, 8), 57, PrefixUse(0, 64, PrefixHit.MISS, 0)),
        ((1, 3, 5, 7, 8), 64, PrefixUse(0, 64, PrefixHit.MISS, 0)),
        ((1, 3, 5, 7, 8), None, PrefixUse(0, 64, PrefixHit.MISS, 0)),
    ],
)
def test_the_later_of_tail_and_rebuild_is_where_it_begins(
    lost: tuple[int, ...], rebuild: int | None, expected: PrefixUse
) -> None:
    planted, path = make(), path_of(NAME)
    planted.plant(NAME)
    lose_tails(planted, *lost)
    path.refresh(planted.tree)
    assert path.choose(planted.tree, rebuild) == expected
    assert expected.rebuilt_tokens == 64 - expected.start


def test_nothing_cached_is_a_miss() -> None:
    planted, path = make(), path_of(NAME)
    path.refresh(planted.tree)
    assert path.choose(planted.tree, 8) == NO_PREFIX == PrefixUse(0, 0, PrefixHit.MISS, 0)


def test_global_blocks_that_are_merely_left_are_no_tail() -> None:
    planted, path = make(), path_of(NAME)
    node = planted.plant(NAME)
    lose_tails(planted, *range(1, 9))
    node.join = JoinPoint(node, JoinKind.REST, [], 0.0)
    path.refresh(planted.tree)
    assert path.choose(planted.tree, 20).hit is PrefixHit.REBUILD
    node.join = JoinPoint(node, JoinKind.TURN, [], 0.0)
    assert path.choose(planted.tree, 20).hit is PrefixHit.RESIDENT


def test_where_all_layers_see_everything_the_whole_match_is_used() -> None:
    planted, path = make(groups=(tiny_group(None),), block_sizes={"global": 8}), path_of(NAME)
    planted.plant("abcde")
    path.refresh(planted.tree)
    assert path.choose(planted.tree, 0) == PrefixUse(40, 40, PrefixHit.RESIDENT, 0)


def test_where_no_layer_sees_everything_the_longest_prefix_with_a_tail_is_used() -> None:
    planted = make(groups=(tiny_group(16),), block_sizes={"sliding": 8}, expected_average_seq_length=128)
    node = planted.plant(NAME)
    path = path_of(NAME)
    path.refresh(planted.tree)
    assert path.choose(planted.tree, None) == PrefixUse(64, 64, PrefixHit.RESIDENT, 0)
    for name in ("abc", "abcdefg"):
        lost = planted.find(name)
        assert lost is not None
        planted.forget(0, lost.blocks[0][0])
    path.refresh(planted.tree)
    # The last block is still there and of no use without the one before; "abc" is lost, and no later tail needs it.
    assert node.alive
    assert path.choose(planted.tree, None) == PrefixUse(48, 48, PrefixHit.RESIDENT, 0)
    assert [n.end for n in path.nodes] == [48]
