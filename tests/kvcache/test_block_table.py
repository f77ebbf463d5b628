"""What a table says about the tokens of a chunk that outruns its window."""

from __future__ import annotations

import pytest

from hkv_jax.kvcache.block_table import BlockTable


@pytest.mark.parametrize(
    ("chunks", "partial"),
    [
        ([(0, 8)], set()),
        ([(0, 8), (8, 24)], set()),
        # Tokens 2 and 3 follow those of the first chunk in block 0, and are past before their chunk ends.
        ([(0, 2), (2, 24)], {0}),
        ([(0, 2), (2, 6)], set()),
        ([(0, 6), (6, 7), (7, 24)], {1}),
    ],
)
def test_a_held_block_may_lack_tokens_of_a_chunk_that_outruns_the_window(
    chunks: list[tuple[int, int]], partial: set[int]
) -> None:
    table = BlockTable(4, window=5)
    for start, end in chunks:
        table.release_below(table.first_live(start))
        table.extend(start, end, end, range(table.num_missing(end, end)))
    held = [number for number in range(6) if table.id_of(number) >= 0]
    assert {number for number in held if not table.is_whole(number)} == partial


def test_what_is_kept_for_a_join_point_is_whole() -> None:
    table = BlockTable(4, window=5)
    table.extend(0, 2, 2, range(table.num_missing(2, 2)))
    table.extend(2, 24, 4, range(table.num_missing(24, 4)))
    assert all(table.is_whole(number) for number in range(6))


def test_global_blocks_are_whole() -> None:
    table = BlockTable(4, window=None)
    for start, end in ((0, 2), (2, 24)):
        table.extend(start, end, end, range(table.num_missing(end, end)))
    assert all(table.is_whole(number) for number in range(6))
