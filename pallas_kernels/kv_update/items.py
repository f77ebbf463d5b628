"""What is written where: one item a block that a row adds tokens to. Made once a step, shared by a group's layers.

Within a block a row's new tokens either all have their slot, or none has (they are dropped, or the pool has their K/V
already): the engine cuts chunks and windows at blocks. So the slot of the first one tells of all.

Owns: the list. Must never: look at keys or values.

Axis letters: S rows, T tokens, P token slots of a block, I items.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.pages import NO_SLOT, PageGeometry
from pallas_kernels.prefill_rows import StepTokens

ITEM_FIELDS = 4
"""page of layer 0 · offset in the block of the first token · first token · number of tokens."""


class WriteItems(NamedTuple):
    """Blocks to write.

    Attributes:
        items: i32[I · ITEM_FIELDS], of which the first ``num_items`` count.
        num_items: i32[1].
    """

    items: jax.Array
    num_items: jax.Array


def write_items(pages: PageGeometry, tokens: StepTokens, slots: jax.Array) -> WriteItems:
    """The blocks that rows from ``tokens.first_row`` to ``tokens.end_row`` write; slots i32[T] or NO_SLOT."""
    block, num_tokens = pages.block_size, slots.shape[0]
    begins, ends = tokens.query_starts[:-1], tokens.query_starts[1:]
    num_rows = begins.shape[0]
    row_index = jnp.arange(num_rows, dtype=jnp.int32)
    runs = (row_index >= tokens.first_row) & (row_index < tokens.end_row) & (ends > begins)
    first_blocks = tokens.start_positions // block
    last_blocks = (tokens.start_positions + ends - begins - 1) // block
    item_ends = jnp.cumsum(jnp.where(runs, last_blocks - first_blocks + 1, 0))
    index = jnp.arange(num_tokens // block + 2 * num_rows, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(item_ends, index, side="right"), num_rows - 1).astype(jnp.int32)
    block_of_row = index - jnp.where(row > 0, item_ends[row - 1], 0)
    # Positions relative to the row's first token.
    block_begin = (first_blocks[row] + block_of_row) * block - tokens.start_positions[row]
    begin = jnp.maximum(block_begin, 0)
    length = jnp.minimum(block_begin + block, (ends - begins)[row]) - begin
    token = begins[row] + begin
    slot = slots.at[token].get(mode="clip")
    live = (index < item_ends[-1]) & (slot != NO_SLOT)
    safe = jnp.where(live, slot, 0)
    fields = jnp.stack([safe // block, safe % block, token, length], axis=1)
    # Live ones first, in their order.
    order = jnp.argsort(~live)
    return WriteItems(fields[order].reshape(-1).astype(jnp.int32), jnp.sum(live, dtype=jnp.int32).reshape(1))
