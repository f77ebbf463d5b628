"""How much of the pool a decode kernel holds at once: a formula, and the data file ``tiles.toml`` that may overrule it.

The same tiles serve every chip: they fit the smallest vector memory (64 MiB a core, v5p and tpu7x), since what a
program is compiled for is not known where it is traced.

Owns: those choices. Must never: change a result; a tile is a matter of speed.

Axis letters: P token slots of a block, M blocks of a windowed row, H query heads.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import tomllib
from typing import Any, TypeVar

import jax.numpy as jnp

from pallas_kernels.pages import LANES, AttentionShape

POOL_BYTES = 40 * 2**20
"""Most bytes of vector memory that blocks may take."""

TOGETHER = ((2**19, 4), (2**21, 2))
"""Windows below so many bytes arrive before one computation's latencies are over: so many are computed together."""

UNROLLED_ROWS = 144 * 2**10
"""Rows of keys and values in the code of one windowed program, which has no loop over them: compiling takes some 30 µs
of a processor a row on v5e, in any dtype, and is to take less than 5 s."""

SCORE_BYTES = 2**17
"""Bytes of scores of one tile, in float32: half of the vector registers."""

TILE_BYTES = 2**21
"""A tile of this many bytes is worth a microsecond of the fastest chip's memory, longer than a copy's latency."""

MATRIX_UNIT_LANES = 256


@dataclasses.dataclass(frozen=True)
class WindowTiles:
    """``sequences`` of a program, those computed ``together``, kv heads that share a product, and ``turns``.

    So many programs' windows have room at once: ``sequences`` times ``turns``, at least twice those computed together.
    """

    sequences: int
    together: int
    heads_per_product: int
    turns: int = 1

    def faults(self) -> list[str]:
        """What is wrong with them, in words."""
        faults = []
        if self.sequences % self.together:
            faults.append("sequences must be a multiple of together")
        if self.sequences * self.turns < 2 * self.together:
            faults.append("sequences times turns must be at least twice together")
        return faults

    def for_rows(self, num_rows: int) -> WindowTiles:
        """As these, but with no more sequences than rows, where there is room to fetch ahead all the same."""
        together = min(self.together, num_rows)
        least = together if self.turns > 1 else 2 * together
        sequences = max(least, min(self.sequences, -(-num_rows // together) * together))
        return dataclasses.replace(self, sequences=sequences, together=together)


@dataclasses.dataclass(frozen=True)
class PagedTiles:
    """``blocks`` of a tile (a power of two up to 128), ``buffers`` for tiles, and kv heads that share a product."""

    blocks: int
    buffers: int
    heads_per_product: int

    def faults(self) -> list[str]:
        """What is wrong with them, in words."""
        faults = []
        if LANES % self.blocks:
            faults.append(f"blocks must be a power of two up to {LANES}")
        if self.buffers < 2:
            faults.append("buffers must be at least 2")
        return faults


_Tiles = TypeVar("_Tiles", WindowTiles, PagedTiles)


def window_tiles(shape: AttentionShape, dtype: jnp.dtype) -> WindowTiles | None:
    """Tiles of a windowed decode; ``None`` where two windows do not fit vector memory."""
    row_bytes = shape.table_width * page_bytes(shape, dtype)
    if 2 * row_bytes > POOL_BYTES:
        return None
    together = next((count for most, count in TOGETHER if row_bytes < most), 1)
    places = max(2 * together, min(8 if together > 1 else 4, POOL_BYTES // row_bytes))
    divisors = (n for n in range(places, together, -1) if not places % n and not n % together)
    most = UNROLLED_ROWS // (shape.table_width * shape.pages.rows)
    sequences = next((n for n in divisors if n <= most), together)
    chosen = {"sequences": sequences, "together": together, "heads_per_product": heads_per_product(shape)}
    chosen |= overrides("windowed_decode", shape)
    chosen.setdefault("turns", max(1, places // chosen["sequences"]))
    return _checked(WindowTiles(**chosen), shape)


def paged_tiles(shape: AttentionShape, dtype: jnp.dtype) -> PagedTiles:
    """Tiles of a paged decode."""
    block = shape.pages.block_size
    by_scores = SCORE_BYTES // (4 * shape.num_heads * block)
    by_bytes = TILE_BYTES // page_bytes(shape, dtype)
    most = POOL_BYTES // (2 * page_bytes(shape, dtype))
    blocks = _power_of_two(min(max(1, min(by_scores, by_bytes)), most, LANES))
    buffers = max(2, min(4, 1 + -(-TILE_BYTES // (blocks * page_bytes(shape, dtype)))))
    chosen = PagedTiles(blocks, buffers, heads_per_product(shape))
    return _checked(dataclasses.replace(chosen, **overrides("paged_decode", shape)), shape)


def _checked(tiles: _Tiles, shape: AttentionShape) -> _Tiles:
    """The tiles, if their numbers fit together; whether they fit vector memory the compiler says.

    Raises:
        ValueError: they do not, as only those of the data file can.
    """
    faults = tiles.faults()
    if shape.pages.num_kv_heads % tiles.heads_per_product:
        faults.append(f"heads_per_product must divide {shape.pages.num_kv_heads} kv heads")
    if faults:
        raise ValueError(f"tiles.toml: {'; '.join(faults)}; {tiles} for {shape}")
    return tiles


def heads_per_product(shape: AttentionShape) -> int:
    """As many kv heads as fill the depth of a matrix unit."""
    most = max(1, MATRIX_UNIT_LANES // (shape.pages.key_planes * LANES))
    return next(n for n in range(most, 0, -1) if shape.pages.num_kv_heads % n == 0)


def page_bytes(shape: AttentionShape, dtype: jnp.dtype) -> int:
    """Bytes of one page."""
    return shape.pages.rows * LANES * jnp.dtype(dtype).itemsize


def _power_of_two(number: int) -> int:
    return 1 << (max(number, 1).bit_length() - 1)


def overrides(kernel: str, shape: AttentionShape) -> dict[str, int]:
    """What the data file says of a kernel at a shape.

    Raises:
        ValueError: a size that is no positive integer.
    """
    of_shape = {
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.pages.num_kv_heads,
        "key_dim": shape.pages.key_dim,
        "block_size": shape.pages.block_size,
    }
    for entry in _data().get(kernel, []):
        if all(entry[name] == value for name, value in of_shape.items()):
            sizes = {name: value for name, value in entry.items() if name not in of_shape}
            if wrong := [name for name, value in sizes.items() if type(value) is not int or value < 1]:
                raise ValueError(f"tiles.toml: {', '.join(wrong)} of {kernel} must be at least 1; {entry}")
            return sizes
    return {}


@functools.cache
def _data() -> dict[str, Any]:
    return tomllib.loads(importlib.resources.files("pallas_kernels").joinpath("tiles.toml").read_text("utf-8"))
