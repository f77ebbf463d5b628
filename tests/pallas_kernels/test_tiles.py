"""Tiles: what the formula chooses for real shapes, and what the data file may overrule."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import jax.numpy as jnp
import pytest

from pallas_kernels import tiles, vector_memory
from pallas_kernels.paged_attention import ops as paged_attention
from pallas_kernels.pages import AttentionShape, PageGeometry
from pallas_kernels.windowed_attention import ops as windowed_attention

BFLOAT16 = jnp.dtype(jnp.bfloat16)
# (query heads, kv heads, head dim, window, block size) of one chip.
SHAPES = {
    "gemma-3-27b, 8 chips": (4, 2, 128, 1024, 64),
    "gemma-3-1b": (4, 1, 256, 512, 32),
    "gpt-oss-20b": (64, 8, 64, 128, 16),
    "gemma-4-31b, local": (32, 16, 256, 1024, 32),
    "olmo-3-32b": (40, 8, 128, 4096, 128),
    "gemma-2-27b": (32, 16, 128, 4096, 128),
    "gemma-4-31b, global": (32, 4, 512, None, 64),
    "llama-3.1-8b": (32, 8, 128, None, 128),
}


def shape_named(name: str) -> AttentionShape:
    heads, kv_heads, dim, window, block = SHAPES[name]
    assert heads and kv_heads and dim and block
    return AttentionShape(PageGeometry(block, kv_heads, dim, dim), heads, window, 1.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8, jnp.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_what_the_kernels_hold_fits_the_smallest_vector_memory(name: str, dtype: jnp.dtype) -> None:
    shape, dtype, num_rows = shape_named(name), jnp.dtype(dtype), 8
    paged = paged_attention.decode_tile(shape, dtype, BFLOAT16)
    held = [paged_attention.vector_buffers(paged)]
    windowed = windowed_attention.decode_tile(shape, dtype, BFLOAT16, num_rows) if shape.window else None
    if windowed is not None:
        held.append(windowed_attention.vector_buffers(windowed))
    for buffers in held:
        assert 2 * tiles.page_bytes(shape, dtype) <= sum(buffer.num_bytes for buffer in buffers)
        assert vector_memory.limit(buffers) <= 64 * 2**20


def test_a_window_that_does_not_fit_twice_is_read_in_tiles() -> None:
    assert tiles.window_tiles(shape_named("gemma-2-27b"), BFLOAT16) is None
    assert tiles.window_tiles(shape_named("olmo-3-32b"), BFLOAT16) is not None


def test_short_windows_are_computed_together() -> None:
    together = [
        tiles.window_tiles(shape_named(name), BFLOAT16)
        for name in ("gpt-oss-20b", "gemma-3-27b, 8 chips", "gemma-4-31b, local")
    ]
    assert [one.together for one in together if one] == [4, 2, 1]


def test_programs_of_long_windows_have_fewer_sequences_and_as_much_room() -> None:
    """The code of a sequence is as long in int8 as in bfloat16, of half the bytes: twice as many would fit."""
    shape = AttentionShape(PageGeometry(64, 16, 256, 256), 32, 1024, 1.0)
    assert tiles.window_tiles(shape, BFLOAT16) == tiles.WindowTiles(2, 1, 1)
    chosen = tiles.window_tiles(shape, jnp.dtype(jnp.int8))
    assert chosen == tiles.WindowTiles(2, 1, 1, turns=2)
    short = tiles.window_tiles(shape_named("gemma-3-27b, 8 chips"), BFLOAT16)
    assert short is not None and short.turns == 1


def test_few_rows_take_few_places() -> None:
    chosen = tiles.WindowTiles(8, 4, 1)
    assert [chosen.for_rows(n).sequences for n in (1, 2, 5, 9, 200)] == [2, 4, 8, 8, 8]
    assert [chosen.for_rows(n).together for n in (1, 2, 5)] == [1, 2, 4]
    in_turns = tiles.WindowTiles(2, 1, 1, turns=2)
    assert [in_turns.for_rows(n).sequences for n in (1, 2, 3)] == [1, 2, 2]


def test_the_data_file_overrules_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_named("gpt-oss-20b")
    entry = {"num_heads": 64, "num_kv_heads": 8, "key_dim": 64, "block_size": 16, "sequences": 6, "together": 3}
    before = tiles.window_tiles(shape, BFLOAT16)
    assert before is not None
    monkeypatch.setattr(tiles, "_data", lambda: {"windowed_decode": [entry]})
    assert tiles.window_tiles(shape, BFLOAT16) == tiles.WindowTiles(6, 3, before.heads_per_product)
    assert tiles.window_tiles(shape_named("gemma-3-1b"), BFLOAT16) != tiles.WindowTiles(6, 3, 1)


def test_more_sequences_of_the_data_file_take_turns_in_the_same_room(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = AttentionShape(PageGeometry(64, 16, 256, 256), 32, 1024, 1.0)
    entry = {"num_heads": 32, "num_kv_heads": 16, "key_dim": 256, "block_size": 64, "sequences": 4}
    monkeypatch.setattr(tiles, "_data", lambda: {"windowed_decode": [entry]})
    assert tiles.window_tiles(shape, jnp.dtype(jnp.int8)) == tiles.WindowTiles(4, 1, 1, turns=1)


@pytest.mark.parametrize(
    ("kernel", "wrong", "message"),
    [
        ("windowed_decode", {"sequences": 6, "together": 4}, "multiple of together"),
        ("windowed_decode", {"sequences": 4, "together": 4, "turns": 1}, "twice together"),
        ("windowed_decode", {"heads_per_product": 3}, "divide 8 kv heads"),
        ("paged_decode", {"blocks": 3}, "power of two up to 128"),
        ("paged_decode", {"buffers": 1}, "at least 2"),
        ("windowed_decode", {"sequences": 0}, "sequences of windowed_decode must be at least 1"),
        ("paged_decode", {"heads_per_product": -1}, "heads_per_product of paged_decode must be at least 1"),
    ],
)
def test_tiles_of_the_data_file_that_do_not_fit_together_are_refused(
    kernel: str, wrong: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"num_heads": 64, "num_kv_heads": 8, "key_dim": 64, "block_size": 16, **wrong}
    monkeypatch.setattr(tiles, "_data", lambda: {kernel: [entry]})
    choose = tiles.window_tiles if kernel == "windowed_decode" else tiles.paged_tiles
    with pytest.raises(ValueError, match=f"tiles.toml: .*{message}"):
        choose(shape_named("gpt-oss-20b"), BFLOAT16)


def test_the_data_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"num_heads": 64, "num_kv_heads": 8, "key_dim": 64, "block_size": 16, "heads": 2}
    lines = [f"{name} = {value}" for name, value in entry.items()]
    (tmp_path / "tiles.toml").write_text("\n".join(["[[paged_prefill]]", *lines]))
    monkeypatch.setattr(importlib.resources, "files", lambda _package: tmp_path)
    tiles._data.cache_clear()
    try:
        assert tiles.overrides("paged_prefill", shape_named("gpt-oss-20b")) == {"heads": 2}
        assert tiles.overrides("paged_decode", shape_named("gpt-oss-20b")) == {}
    finally:
        tiles._data.cache_clear()
