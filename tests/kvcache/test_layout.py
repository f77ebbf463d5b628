"""From a budget to a layout: what is promised at start, and every refusal with the number that would do."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkv_jax.errors import ConfigError
from hkv_jax.kvcache.format import PageLayout
from hkv_jax.kvcache.layout import KVLayout, least_bytes, most_useful_bytes, most_window_blocks, plan_layout
from hkv_jax.testing.cache_layouts import tiny_group, tiny_layout_request

GLOBAL, SLIDING = 0, 1


def plan(**changes: Any) -> KVLayout:
    return plan_layout(tiny_layout_request(**changes))


@settings(max_examples=80)
@given(
    budget=st.integers(16_000, 300_000),
    partition=st.sampled_from(["moving", "static"]),
    page_layout=st.sampled_from(list(PageLayout)),
    windows=st.sampled_from([(None,), (16,), (None, 16), (None, 7, 40)]),
)
def test_every_block_has_its_own_bytes(
    budget: int, partition: str, page_layout: PageLayout, windows: tuple[int | None, ...]
) -> None:
    groups = tuple(
        dataclasses.replace(tiny_group(window, num_layers=1 + index, num_kv_heads=1 + index % 2), name=f"g{index}")
        for index, window in enumerate(windows)
    )
    request = tiny_layout_request(
        groups=groups,
        budget_bytes=budget,
        partition=partition,
        page_layout=page_layout,
        block_sizes={g.name: 16 if g.window is None else 8 for g in groups},
        max_model_len=None,
    )
    try:
        layout = plan_layout(request)
    except ConfigError as error:
        assert "kv_cache_memory" in str(error)  # noqa: PT017  (small budgets may be refused)
        return
    assert layout.total_bytes <= budget
    taken = [np.zeros(arena.total_bytes, bool) for arena in layout.arenas]
    for group in layout.groups:
        blocks = [
            slab * group.blocks_per_slab + index
            for slab in group.initial_slabs
            for index in range(group.blocks_per_slab)
        ]
        assert len(blocks) == group.num_blocks >= max(group.reserve_blocks, group.floor_blocks)
        pages = group.pages(np.array(blocks))
        assert pages.dtype == np.int32
        for block, page in zip(blocks, pages.tolist(), strict=True):
            assert page == group.page(block)
            first = page * group.format.page_bytes
            span = taken[group.arena][first : first + group.format.block_bytes]
            assert span.size == group.format.block_bytes, "a block ends outside its arena"
            assert not span.any(), "two blocks share bytes"
            span[:] = True
        assert layout.arenas[group.arena].slab_bytes % group.format.page_bytes == 0


def test_static_gives_each_kind_of_attention_an_arena() -> None:
    groups = (tiny_group(None), *(dataclasses.replace(tiny_group(w), name=f"sliding_w{w}") for w in (16, 40)))
    layout = plan(groups=groups, partition="static", block_sizes={"global": 8, "sliding": 4})
    assert [group.arena for group in layout.groups] == [0, 1, 1]
    assert {group.arena for group in plan(groups=groups, block_sizes={}).groups} == {0}
    single = plan(partition="static")
    assert [arena.slab_bytes for arena in single.arenas] == [g.format.block_bytes for g in single.groups]
    assert [group.initial_slabs[0] for group in single.groups] == [0, 0]


def test_floors_demands_and_tables_follow_the_window() -> None:
    layout = plan(expected_average_seq_length=64)
    all_tokens, window = layout.groups
    assert (all_tokens.floor_blocks, all_tokens.demand_blocks, all_tokens.table_width) == (16, 8, 16)
    # ceil(15 / 4) blocks of the old window, as many of the new one, 2 for the edges; one edge in decode.
    assert (window.floor_blocks, window.demand_blocks, window.table_width) == (10, 5, 5)
    assert layout.expected_seq_length == 64
    assert layout.largest_block_size == 8
    short = plan(max_model_len=10).groups[SLIDING]
    assert (short.floor_blocks, short.demand_blocks, short.table_width) == (3, 3, 3)
    small_chunks = plan(max_chunk=3).groups[SLIDING]
    assert small_chunks.floor_blocks == 4 + 1 + 2
    # A window always owns its floor; where the boundary moves, a chunk's blocks will do for what sees everything.
    assert all(group.reserve_blocks == group.floor_blocks for group in layout.groups if group.spec.window is not None)
    assert all(0 < group.reserve_blocks <= group.floor_blocks for group in layout.groups)


@pytest.mark.parametrize(
    ("window", "size", "chunk", "most"), [(16, 4, 1, 5), (1, 4, 1, 1), (17, 16, 1, 2), (16, 4, 2, 7)]
)
def test_window_bound(window: int, size: int, chunk: int, most: int) -> None:
    assert most_window_blocks(window, size, chunk) == most


def test_expected_length_is_clamped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        layout = plan(expected_average_seq_length=500)
    assert layout.expected_seq_length == 128
    assert [record.getMessage() for record in caplog.records] == [
        "EXPECTED_AVERAGE_SEQ_LENGTH 500 is more than max_model_len; 128 is used"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert plan(expected_average_seq_length=128).expected_seq_length == 128
    assert not caplog.records


def test_expected_length_by_the_model() -> None:
    big = {"max_model_len": 40_000, "config_max_len": 100_000, "budget_bytes": 32 * 2**20}
    assert plan(**big).expected_seq_length == 8192
    assert plan(**big, groups=(tiny_group(None), tiny_group(2048))).expected_seq_length == 8 * 2048
    assert plan(**big, groups=(tiny_group(None),)).expected_seq_length == 8192
    assert plan().expected_seq_length == 128


def test_expected_length_moves_the_split() -> None:
    short, long = (plan(expected_average_seq_length=e, budget_bytes=2**19) for e in (16, 128))
    assert short.groups[SLIDING].num_blocks > long.groups[SLIDING].num_blocks
    assert short.groups[GLOBAL].num_blocks < long.groups[GLOBAL].num_blocks
    for layout in (short, long):
        sequences = layout.max_num_sequences_of_expected
        assert all(sequences * group.demand_blocks <= group.num_blocks for group in layout.groups)
        assert any((sequences + 1) * group.demand_blocks > group.num_blocks for group in layout.groups)


@pytest.mark.parametrize("partition", ["moving", "static"])
def test_default_length_takes_half_and_a_length_asked_for_may_take_all(partition: str) -> None:
    # Without windows, blocks of 8 tokens and 512 bytes: 64 KiB are 128 blocks, 1,024 tokens.
    only_global: dict[str, Any] = {"groups": (tiny_group(None, num_layers=1),), "partition": partition}
    assert plan(**only_global, max_model_len=None).max_model_len == 512
    assert plan(**only_global, max_model_len=None, config_max_len=300).max_model_len == 300
    assert plan(**only_global, max_model_len=1024).max_model_len == 1024
    with pytest.raises(ConfigError, match=r"max_model_len 1025 tokens; give at least 66048 bytes .* at most 1024$"):
        plan(**only_global, max_model_len=1025)
    hybrid = plan(max_model_len=None, partition=partition)
    floors = sum(-(-g.floor_blocks // g.blocks_per_slab) * hybrid.arenas[g.arena].slab_bytes for g in hybrid.groups)
    assert 2 * floors <= 64 * 1024


@pytest.mark.parametrize("partition", ["moving", "static"])
def test_a_refused_budget_names_numbers_that_do(partition: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(max_model_len=4096, partition=partition)
    found = re.search(r"at least (\d+) bytes .* max_model_len at most (\d+)", str(caught.value))
    assert found
    needed, longest = int(found[1]), int(found[2])
    assert least_bytes(tiny_layout_request(max_model_len=4096, partition=partition)) == needed
    assert plan(max_model_len=4096, partition=partition, budget_bytes=needed).max_model_len == 4096
    assert plan(max_model_len=longest, partition=partition).max_model_len == longest
    with pytest.raises(ConfigError):
        plan(max_model_len=4096, partition=partition, budget_bytes=needed - 1)
    with pytest.raises(ConfigError):
        plan(max_model_len=longest + 1, partition=partition)


def test_a_budget_for_nothing_names_the_least() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(max_model_len=None, budget_bytes=100)
    found = re.search(r"the least that holds anything is (\d+) bytes", str(caught.value))
    assert found
    assert plan(max_model_len=None, budget_bytes=int(found[1])).max_model_len >= 1
    with pytest.raises(ConfigError):
        plan(max_model_len=None, budget_bytes=int(found[1]) - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget_bytes": 0}, "budget_bytes must be at least 1, is 0"),
        ({"max_chunk": 0}, "max_chunk must be at least 1"),
        ({"partition": "both"}, "kv_partition must be moving or static, is 'both'"),
        ({"expected_average_seq_length": -5}, "EXPECTED_AVERAGE_SEQ_LENGTH must be a positive integer, is -5"),
        ({"max_model_len": 4097}, "max_model_len 4097 must lie between 1 and the model's 4096"),
        ({"max_model_len": 0}, "max_model_len 0 must lie between"),
        ({"tensor_parallel": 3, "groups": (tiny_group(None, num_kv_heads=2),)}, "tensor_parallel_size 3"),
    ],
)
def test_values_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**changes)


def test_an_arena_too_large_to_address_is_refused() -> None:
    # A row of one byte, and four of its scale.
    rows_of_a_byte: dict[str, Any] = {
        "groups": (tiny_group(None, num_layers=1024, head_dim=1),),
        "itemsize": 1,
        "block_sizes": {"global": 4096},
    }
    with pytest.raises(ConfigError, match="more than the 2147483646 that can be addressed") as caught:
        plan(**rows_of_a_byte, budget_bytes=5 * 2**31)
    most = int(str(caught.value).rsplit(maxsplit=2)[1])
    assert plan(**rows_of_a_byte, budget_bytes=most).total_bytes == 5 * (2**31 - 2 * 1024 * 4096)


def test_description_adds_up() -> None:
    layout = plan()
    rows = layout.describe()
    assert [row.name for row in rows] == ["global", "sliding"]
    for row, group in zip(rows, layout.groups, strict=True):
        assert row.num_tokens == row.num_blocks * group.format.block_size
        assert row.num_bytes == row.num_blocks * group.format.block_bytes == round(row.mebibytes * 2**20)
    assert sum(row.num_bytes for row in rows) <= layout.total_bytes
    # 100 tokens: 13 global blocks of 512 bytes and 25 sliding ones of 768, all kept.
    assert layout.all_global_bytes(100) == 13 * 512 + 25 * 768


def test_useful_bytes_hold_every_sequence_at_full_length() -> None:
    request = tiny_layout_request(max_num_seqs=3)
    useful = most_useful_bytes(request)
    layout = plan_layout(dataclasses.replace(request, budget_bytes=useful + 4096))
    assert layout.max_num_sequences_of_expected >= 3
    assert most_useful_bytes(dataclasses.replace(request, max_num_seqs=6)) < 2.5 * useful


@pytest.mark.parametrize("max_model_len", [1, 100, 1000])
def test_useful_bytes_hold_one_sequence_whatever_slabs_round_up(max_model_len: int) -> None:
    request = tiny_layout_request(max_num_seqs=1, max_model_len=max_model_len)
    layout = plan_layout(dataclasses.replace(request, budget_bytes=most_useful_bytes(request)))
    assert layout.max_num_sequences_of_expected >= 1
