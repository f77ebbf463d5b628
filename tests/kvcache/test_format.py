"""Pages: their shapes and bytes in both layouts, and the block sizes chosen for known models."""

from __future__ import annotations

import pytest

from hkv_jax.errors import ConfigError
from hkv_jax.kvcache.format import KVFormat, PageLayout, choose_block_sizes, default_block_sizes, kv_heads_per_chip
from hkv_jax.testing.cache_layouts import tiny_group

ROWS, PLANES = PageLayout.ROWS, PageLayout.PLANES


def test_page_of_rows_holds_keys_then_values() -> None:
    page = KVFormat(ROWS, block_size=32, num_kv_heads=4, head_dim=80, itemsize=2, num_layers=5)
    assert (page.num_planes, page.rows_per_page, page.row_elements) == (2, 64, 320)
    assert page.page_bytes == 2 * 32 * 4 * 80 * 2
    assert page.block_bytes == 5 * page.page_bytes


@pytest.mark.parametrize(("head_dim", "planes"), [(16, 1), (64, 1), (65, 2), (80, 2), (128, 2), (256, 4), (512, 8)])
def test_page_of_planes_pads_heads_to_128_lanes(head_dim: int, planes: int) -> None:
    page = KVFormat(PLANES, block_size=64, num_kv_heads=3, head_dim=head_dim, itemsize=2, num_layers=1)
    assert (page.num_planes, page.row_elements, page.rows_per_page) == (3 * planes, 128, 3 * planes * 64)
    assert page.page_bytes == 3 * planes * 64 * 128 * 2


@pytest.mark.parametrize(("heads", "chips", "local"), [(8, 1, 8), (8, 4, 2), (2, 4, 1), (1, 8, 1), (6, 3, 2)])
def test_heads_are_divided_or_replicated(heads: int, chips: int, local: int) -> None:
    assert kv_heads_per_chip(heads, chips) == local


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size 4 .* 6 kv heads"):
        kv_heads_per_chip(6, 4)


@pytest.mark.parametrize(
    ("window", "itemsize", "size"),
    [(16, 4, 16), (128, 2, 16), (128, 1, 32), (511, 2, 16), (512, 2, 32), (1000, 2, 32), (1024, 2, 64), (4096, 2, 128)],
)
def test_window_blocks_are_a_sixteenth_of_the_window(window: int, itemsize: int, size: int) -> None:
    assert default_block_sizes([tiny_group(window)], ROWS, itemsize) == {"sliding": size}


def test_global_blocks_follow_the_backend_and_the_window() -> None:
    wide = tiny_group(None, num_kv_heads=4, head_dim=128)
    assert default_block_sizes([wide], ROWS, 2) == {"global": 32}
    assert default_block_sizes([wide], PLANES, 2) == {"global": 64}
    assert default_block_sizes([wide, tiny_group(4096)], ROWS, 2) == {"global": 128, "sliding": 128}
    # One head of 128 a chip makes pages of 32 KiB; one of 64 shares a plane, and 64 tokens would be 16 KiB.
    assert default_block_sizes([wide], PLANES, 2, tensor_parallel=4) == {"global": 64}
    assert default_block_sizes([tiny_group(None, num_kv_heads=1, head_dim=64)], PLANES, 2) == {"global": 128}


def test_given_sizes_are_taken_and_defaults_follow_them() -> None:
    groups = [tiny_group(None), tiny_group(512)]
    assert choose_block_sizes(groups, {}, ROWS, 2, 1) == {"global": 32, "sliding": 32}
    assert choose_block_sizes(groups, {"sliding": 64}, ROWS, 2, 1) == {"global": 64, "sliding": 64}
    assert choose_block_sizes(groups, {"global": 16}, ROWS, 2, 1) == {"global": 16, "sliding": 16}
    assert choose_block_sizes(groups, {"global": 64, "sliding": 4}, ROWS, 2, 1) == {"global": 64, "sliding": 4}


@pytest.mark.parametrize(
    ("given", "layout", "message"),
    [
        ({"local": 16}, ROWS, "no group is called 'local'"),
        ({"sliding": 24}, ROWS, "sliding=24 must be a power of two"),
        ({"sliding": 0}, ROWS, "sliding=0 must be a power of two"),
        ({"sliding": 8}, PLANES, "sliding=8 must be a power of two from 16 to 4096"),
        ({"global": 16, "sliding": 32}, ROWS, "give global=32"),
    ],
)
def test_sizes_that_cannot_work_are_refused(given: dict[str, int], layout: PageLayout, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_block_sizes([tiny_group(None), tiny_group(512)], given, layout, 2, 1)


@pytest.mark.parametrize(
    ("heads", "head_dim", "block", "row_bytes", "page_bytes"),
    [(1, 64, 128, 132, 128 * 132), (2, 128, 32, 132, 4 * 32 * 132), (1, 256, 32, 132, 4 * 32 * 132)],
)
def test_a_page_of_bytes_has_whole_rows_of_scales(
    heads: int, head_dim: int, block: int, row_bytes: int, page_bytes: int
) -> None:
    group = tiny_group(256, num_kv_heads=heads, head_dim=head_dim)
    assert default_block_sizes([group], PLANES, 1) == {"sliding": block}
    page = KVFormat(PLANES, block, heads, head_dim, itemsize=1, num_layers=1)
    assert (page.row_bytes, page.page_bytes) == (row_bytes, page_bytes)
    with pytest.raises(ConfigError, match=f"a power of two from {block} to 4096"):
        choose_block_sizes([group], {"sliding": block // 2}, PLANES, 1, 1)
