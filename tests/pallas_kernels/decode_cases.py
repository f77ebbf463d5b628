"""A pool, tables and rows for decode kernels, with NaN in every row of the pool where no key of a row lies.

Owns: such cases, and what a decode must give for them. Must never: choose a kernel's tiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_inputs import DecodeInputs
from pallas_kernels.decode_reference import decode_reference
from pallas_kernels.pages import NO_SLOT, AttentionShape
from pallas_kernels.rows import DecodeRows, QueryRows, global_rows, windowed_rows
from pallas_kernels.scales import Arena
from tests.pallas_kernels.interpreted import INTERPRET, assert_same_bits, settled_call
from tests.pallas_kernels.pools import NanPool, drawn_tokens

NUM_LAYERS = 2
LAYER = 1


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One call: rows at ``positions`` (−1: a row that does nothing), those in ``without_slot`` write nothing.

    Windowed layers have nothing below ``context_starts`` (all 0 where there are none).
    """

    shape: AttentionShape
    positions: tuple[int, ...]
    dtype: str = "float32"
    query_dtype: str = "float32"
    without_slot: tuple[int, ...] = ()
    context_starts: tuple[int, ...] = ()
    sinks: bool = False
    seed: int = 0

    def inputs(self) -> DecodeInputs:
        rng = np.random.default_rng(self.seed)
        pages, num_rows = self.shape.pages, len(self.positions)
        positions = np.array(self.positions, np.int32)
        context_starts = np.array(self.context_starts or (0,) * num_rows, np.int32)
        ring = self.shape.window is not None
        width = self.shape.table_width if ring else max(int(positions.max(initial=0)) // pages.block_size + 2, 2)
        # Lanes are not rows, and pages lie in no order; the pool has blocks that nobody holds.
        num_lanes = num_rows + 1
        lanes = rng.permutation(num_lanes)[:num_rows].astype(np.int32)
        num_blocks = num_lanes * (width + 1) + 3
        block_order = rng.permutation(num_blocks)
        tables = (block_order[: num_lanes * width].reshape(num_lanes, width) * NUM_LAYERS).astype(np.int32)
        spare = block_order[num_lanes * width :] * NUM_LAYERS
        pool = NanPool(pages, self.dtype, num_blocks * NUM_LAYERS)
        slots = np.full(num_rows, NO_SLOT, np.int32)
        for row, position in enumerate(positions):
            if position >= 0:
                slots[row] = self._fill(rng, pool, tables[lanes[row]], (row, int(position)), int(spare[row]))
        live = jnp.asarray(positions >= 0)
        safe = jnp.asarray(np.maximum(positions, 0))
        query_rows = QueryRows(jnp.asarray(lanes), safe, jnp.asarray(context_starts), jnp.asarray(slots), live)
        rows: DecodeRows = (
            windowed_rows(self.shape, jnp.asarray(tables), query_rows)
            if ring
            else global_rows(jnp.asarray(tables), query_rows)
        )
        keys, values, words = drawn_tokens(rng, num_rows, pages, self.dtype)
        normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
        return DecodeInputs(
            normal(num_rows, self.shape.num_heads, pages.key_dim).astype(self.query_dtype),
            keys,
            values,
            pool.arena(),
            jnp.asarray(LAYER, jnp.int32),
            rows,
            normal(self.shape.num_heads) if self.sinks else None,
            words,
        )

    def _fill(
        self, rng: np.random.Generator, pool: NanPool, table: np.ndarray, who: tuple[int, int], spare: int
    ) -> int:
        """Puts keys where the row has some, and returns its slot."""
        row, position = who
        pages, width = self.shape.pages, len(table)
        block = pages.block_size
        context_start = self.context_starts[row] if self.context_starts else 0
        first = 0 if self.shape.window is None else max(position - self.shape.window + 1, context_start)
        writes = row not in self.without_slot
        # A global row without a slot reads what the pool has at its own position.
        end = position + (self.shape.window is None and not writes)
        tokens = drawn_tokens(rng, end - first, pages, self.dtype)
        for index, p in enumerate(range(first, end)):
            pool.put(int(table[p // block % width]) + LAYER, p % block, tokens, index)
        if not writes:
            return NO_SLOT
        column = position // block % width
        if self.shape.window is not None and position % block == 0:
            # The ring learns of a new block after the step.
            return int(spare * block)
        return int(table[column] * block + position % block)


Decode = Callable[[AttentionShape, DecodeInputs, Any], tuple[jax.Array, Arena]]


def check_decode_case(case: DecodeCase, decode: Decode) -> None:
    """Outputs are those of the reference, the pool is it bit for bit, there is no race, and nothing is NaN."""
    inputs = case.inputs()
    expected, expected_pool = decode_reference(case.shape, inputs)
    outputs, pool = settled_call(lambda given: decode(case.shape, given, INTERPRET), inputs)
    assert outputs.dtype == inputs.queries.dtype
    jax.tree.map(assert_same_bits, pool, expected_pool)
    # Integers become what queries are, and products are of that.
    tolerance = 2e-6 if case.query_dtype == "float32" and case.dtype != "bfloat16" else 2e-2
    np.testing.assert_allclose(
        np.asarray(outputs, np.float32), np.asarray(expected), rtol=tolerance, atol=tolerance, equal_nan=False
    )
    for row, position in enumerate(case.positions):
        assert position >= 0 or not np.asarray(outputs[row]).any()
