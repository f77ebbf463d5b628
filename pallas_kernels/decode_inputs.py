"""The arrays of one layer's decode, the same for windowed and global attention.

Owns: ``DecodeInputs`` and their check. Must never: choose tiles.

Axis letters: S rows, H query heads, K kv heads, D head dim, M columns of a table row, P token slots of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from pallas_kernels.pages import LANES, AttentionShape, row_tile
from pallas_kernels.rows import DecodeRows
from pallas_kernels.scales import Arena, check_dtype, values_of


class DecodeInputs(NamedTuple):
    """Arrays of one layer.

    Attributes:
        queries: [S, H, Dk], one a row.
        keys: [S, K, Dk] of the rows' own tokens, KV dtype.
        values: [S, K, Dv].
        arena: [1, rows, 128] of this chip, int8 with its words.
        layer: i32[], index in the group.
        rows: tables, lengths and slots.
        sinks: f32[H], a learned score of each head that takes probability and gives nothing; or None.
        words: i32[S, C], scales of the rows' own tokens where K/V are int8, as ``scales.quantise`` gives them.
    """

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    arena: Arena
    layer: jax.Array
    rows: DecodeRows
    sinks: jax.Array | None = None
    words: jax.Array | None = None


def check_decode(shape: AttentionShape, inputs: DecodeInputs) -> None:
    """Checks what a kernel takes for granted.

    Raises:
        ValueError: shapes or dtypes do not fit together; the message names the argument, its value and what would do.
    """
    pages, num_rows = shape.pages, inputs.queries.shape[0]
    expected = {
        "queries": (inputs.queries, (num_rows, shape.num_heads, pages.key_dim)),
        "keys": (inputs.keys, (num_rows, pages.num_kv_heads, pages.key_dim)),
        "values": (inputs.values, (num_rows, pages.num_kv_heads, pages.value_dim)),
        "rows.kv_lens": (inputs.rows.kv_lens, (num_rows,)),
        "rows.slots": (inputs.rows.slots, (num_rows,)),
    }
    if inputs.sinks is not None:
        expected["sinks"] = (inputs.sinks, (shape.num_heads,))
    if inputs.words is not None:
        expected["words"] = (inputs.words, (num_rows, pages.num_planes))
    for name, (array, wanted) in expected.items():
        if array.shape != wanted:
            raise ValueError(f"{name} has shape {array.shape}; {wanted} is needed")
    if shape.num_heads % pages.num_kv_heads:
        raise ValueError(f"num_heads {shape.num_heads} is no multiple of {pages.num_kv_heads} kv heads")
    for name, array in (("keys", inputs.keys), ("values", inputs.values)):
        check_dtype(name, array, inputs.arena, inputs.words)
    arena = values_of(inputs.arena)
    tile = row_tile(arena.dtype)
    if pages.block_size % tile:
        raise ValueError(f"blocks of {pages.block_size} tokens; {arena.dtype} needs a multiple of {tile}")
    if arena.ndim != 3 or arena.shape[-1] != LANES or arena.shape[1] % pages.rows:
        raise ValueError(f"the arena is {arena.shape}; [1, a multiple of {pages.rows} rows, {LANES}] is needed")
