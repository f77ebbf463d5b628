"""A pool, tables and rows for prefill kernels, with NaN wherever no key of a row lies, in the pool and among tokens.

Owns: such cases, and what a prefill must give for them. Must never: choose a kernel's tiles, but shrink them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.pages import AttentionShape
from pallas_kernels.prefill_attention.ops import PrefillInputs, run
from pallas_kernels.prefill_attention.reference import prefill_reference
from pallas_kernels.prefill_attention.tile import PrefillTile, choose_tile
from pallas_kernels.prefill_rows import StepTokens, prefill_rows
from pallas_kernels.scales import NewKV
from tests.pallas_kernels.interpreted import INTERPRET, assert_same_bits, settled_call
from tests.pallas_kernels.pools import NanPool, as_tokens, drawn_tokens

NUM_LAYERS = 2
LAYER = 1


@dataclasses.dataclass(frozen=True)
class PrefillCase:
    """One call.

    ``rows`` are (position of the first query, number of queries, context start) of the rows that prefill;
    ``decode_rows`` tokens before them and all after them belong to nobody. ``tile`` holds changes to the plan.
    """

    shape: AttentionShape
    rows: tuple[tuple[int, int, int], ...]
    num_tokens: int
    decode_rows: int = 0
    dtype: str = "float32"
    query_dtype: str = "float32"
    sinks: bool = False
    tile: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    @property
    def plan(self) -> PrefillTile:
        chosen = choose_tile(self.shape, self.num_tokens, jnp.dtype(self.dtype), jnp.dtype(self.query_dtype))
        changed = dataclasses.replace(chosen, **dict(self.tile))
        changed.check()
        return changed

    @property
    def tokens(self) -> StepTokens:
        lengths = [1] * self.decode_rows + [length for _, length, _ in self.rows] + [0]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        num_rows = self.decode_rows + len(self.rows)
        positions = [7] * self.decode_rows + [start for start, _, _ in self.rows] + [0]
        contexts = [0] * self.decode_rows + [context for _, _, context in self.rows] + [0]
        # Rows are not lanes; the last row is padding.
        lanes = np.random.default_rng(self.seed).permutation(num_rows + 2)[: num_rows + 1]
        arrays = (lanes, positions, contexts, starts, self.decode_rows, num_rows)
        return StepTokens(*(jnp.asarray(array, jnp.int32) for array in arrays))

    def inputs(self) -> PrefillInputs:
        rng = np.random.default_rng(self.seed)
        pages, tokens = self.shape.pages, self.tokens
        longest = max(start + length for start, length, _ in self.rows)
        width = self.shape.table_width if self.shape.window is not None else -(-longest // pages.block_size) + 1
        num_lanes = tokens.lanes.shape[0] + 1
        num_blocks = num_lanes * width + 3
        tables = (rng.permutation(num_blocks)[: num_lanes * width].reshape(num_lanes, width) * NUM_LAYERS).astype(
            np.int32
        )
        pool = NanPool(pages, self.dtype, num_blocks * NUM_LAYERS)
        heads = pages.num_kv_heads
        keys = np.full((self.num_tokens, heads, pages.key_dim), np.nan, np.float32)
        values = np.full((self.num_tokens, heads, pages.value_dim), np.nan, np.float32)
        for number, (start, length, context) in enumerate(self.rows, start=self.decode_rows):
            first_token = int(tokens.query_starts[number])
            own = slice(first_token, first_token + length)
            keys[own], values[own] = (rng.standard_normal(a[own].shape) for a in (keys, values))
            first = 0 if self.shape.window is None else max(start - self.shape.window + 1, context)
            end = start + length if self.shape.window is None else start
            table = tables[int(tokens.lanes[number])]
            self._fill(rng, pool, table, (first, end))
        normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
        query_dtype, new = jnp.dtype(self.query_dtype), NewKV(*as_tokens(keys, values, pages, self.dtype))
        rows = prefill_rows(self.shape, jnp.asarray(tables), tokens, self.num_tokens, self.plan.queries)
        return PrefillInputs(
            normal(self.num_tokens, self.shape.num_heads, pages.key_dim).astype(query_dtype),
            new.keys,
            new.values,
            pool.arena(),
            jnp.asarray(LAYER, jnp.int32),
            rows,
            normal(self.num_tokens, self.shape.num_heads, pages.value_dim).astype(query_dtype),
            normal(self.shape.num_heads) if self.sinks else None,
            new.words,
        )

    def _fill(self, rng: np.random.Generator, pool: NanPool, table: np.ndarray, span: tuple[int, int]) -> None:
        block = self.shape.pages.block_size
        tokens = drawn_tokens(rng, max(span[1] - span[0], 0), self.shape.pages, self.dtype)
        for index, position in enumerate(range(*span)):
            pool.put(int(table[position // block % len(table)]) + LAYER, position % block, tokens, index)


def check_prefill_case(case: PrefillCase) -> None:
    """Outputs are those of the reference, what no row has is untouched, there is no race, and nothing is NaN."""
    inputs, plan = case.inputs(), case.plan
    expected = prefill_reference(case.shape, inputs, plan.queries)
    outputs = settled_call(lambda given: run(plan, given, INTERPRET), inputs)
    assert outputs.dtype == inputs.queries.dtype
    first, last = (int(case.tokens.query_starts[row]) for row in (case.tokens.first_row, case.tokens.end_row))
    for others in (slice(0, first), slice(last, None)):
        assert_same_bits(outputs[others], inputs.outputs[others])
    tolerance = 2e-6 if plan.compute_dtype == jnp.float32 and case.query_dtype == "float32" else 2e-2
    live = slice(first, last)
    np.testing.assert_allclose(
        np.asarray(outputs[live], np.float32),
        np.asarray(expected[live]),
        rtol=tolerance,
        atol=tolerance,
        equal_nan=False,
    )
