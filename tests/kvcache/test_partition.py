"""The split of a budget against brute force, and on the one layout the design measured."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hkv_jax.kvcache.partition import Partition, PoolNeed, partition_budget, smallest_budget


def need(arena: int, layers: int, page_bytes: int, floor: int, demand: int) -> PoolNeed:
    return PoolNeed(arena, page_bytes, layers * page_bytes, floor, floor, demand)


needs_of_one_arena = st.lists(
    st.builds(need, st.just(0), st.integers(1, 6), st.sampled_from([8, 16, 24]), st.integers(1, 6), st.integers(1, 6)),
    min_size=1,
    max_size=3,
)


def slabs_wanted(needs: list[PoolNeed], slab_bytes: int, sequences: int) -> list[int]:
    blocks = [max(n.reserve_blocks, sequences * n.demand_blocks) for n in needs]
    return [math.ceil(b / (slab_bytes // n.block_bytes)) for b, n in zip(blocks, needs, strict=True)]


def best_slab_size(needs: list[PoolNeed], budget: int, parts: int) -> int | None:
    """The design's formula, one candidate after another."""
    blocks = [n.block_bytes for n in needs]
    if len(needs) == 1:
        return blocks[0]
    unit = math.lcm(*(n.page_bytes for n in needs))
    best: tuple[float, int] | None = None
    for slab in range(unit, min(math.lcm(*blocks), budget // len(needs)) + 1, unit):
        if slab < max(blocks):
            continue
        if sum(math.ceil(n.floor_blocks / (slab // n.block_bytes)) for n in needs) * parts > budget // slab:
            continue
        waste = max(slab % b for b in blocks) / slab + budget % slab / budget + len(needs) * slab / (2 * budget)
        if best is None or waste < best[0] - 1e-12:
            best = (waste, slab)
    return best[1] if best else None


@settings(max_examples=300)
@given(needs=needs_of_one_arena, budget=st.integers(1, 6000), parts=st.sampled_from([1, 2]))
@example(needs=[need(0, 5, 16, 5, 5), need(0, 1, 8, 6, 2), need(0, 3, 16, 1, 2)], budget=1157, parts=2)
def test_split_is_what_brute_force_finds(needs: list[PoolNeed], budget: int, parts: int) -> None:
    partition = partition_budget(needs, budget, parts)
    slab = best_slab_size(needs, budget, parts)
    if slab is None or sum(slabs_wanted(needs, slab, 0)) * slab * parts > budget:
        assert partition is None
        return
    assert partition is not None
    assert partition.slab_bytes == (slab,)
    assert sum(partition.group_slabs) == budget // slab
    most = 0
    while sum(slabs_wanted(needs, slab, most + 1)) * slab <= budget:
        most += 1
    wanted = slabs_wanted(needs, slab, most)
    assert all(have >= least for have, least in zip(partition.group_slabs, wanted, strict=True))


def test_left_over_slabs_go_to_the_group_that_limits() -> None:
    # Blocks of 8 and 16 bytes in slabs of 16: each sequence takes 3 + 1 slabs, 2 are left of 10 after two sequences.
    needs = [need(0, 1, 8, 1, 6), need(0, 2, 8, 1, 1)]
    partition = partition_budget(needs, 160, 1)
    # Both serve 2 sequences, so the tie gives the first slab to group 0 (2.33), and then group 1 limits.
    assert partition == Partition((16,), (7, 3))


def test_an_arena_each_has_slabs_of_one_block() -> None:
    partition = partition_budget([need(0, 3, 8, 2, 4), need(1, 5, 16, 2, 1)], 1000, 1)
    assert partition is not None
    assert partition.slab_bytes == (24, 80)
    assert partition.group_slabs[0] * 24 + partition.group_slabs[1] * 80 <= 1000
    # A sequence takes 4 * 24 + 80 bytes; five leave 120: one block for group 0, then group 1 limits and takes the rest.
    assert partition.group_slabs == (21, 6)


@settings(max_examples=60)
@given(needs=needs_of_one_arena)
def test_smallest_budget_is_the_smallest(needs: list[PoolNeed]) -> None:
    budget = smallest_budget(needs)
    assert partition_budget(needs, budget, 1) is not None
    assert partition_budget(needs, budget - 1, 1) is None


@pytest.mark.parametrize(("gib", "slab_mib", "slabs"), [(12, 130, 94), (1, 26, 39)])
def test_the_layout_the_design_measured(gib: int, slab_mib: int, slabs: int) -> None:
    # Gemma 3 27B on one chip: 10 global and 52 sliding layers of 16 heads of 128 in bfloat16, blocks of 64 tokens.
    page = 16 * 2 * 64 * 128 * 2
    needs = [need(0, 10, page, 15, 128), need(0, 52, page, 32, 17)]
    partition = partition_budget(needs, gib * 2**30, 1)
    assert partition is not None
    assert partition.slab_bytes == (slab_mib * 2**20,)
    assert sum(partition.group_slabs) == slabs
