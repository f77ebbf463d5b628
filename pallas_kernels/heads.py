"""How query heads lie in the rows of a product, so that few products serve all of them.

Several kv heads share one product: their planes lie side by side on the contracted lanes, and the queries of each head
are zero on the lanes of the others (block-diagonal). The matrix unit's work is that of the keys, which pass through it
once in either form, but there are fewer and fuller results. Heads of at most 64 elements travel two to a row of 128
lanes, so that queries and outputs cost half the bytes.

Owns: the order of heads in rows. Must never: look at masks, pages or sequences.

Axis letters: S sequences, H query heads, K kv heads, D head dim, G query heads a kv head, T keys of a tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.pages import LANES, AttentionShape

HALF = LANES // 2


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """Rows of queries, scores and outputs of one sequence.

    Attributes:
        shape: the attention.
        heads_per_product: kv heads that share a product; divides the kv heads.
    """

    shape: AttentionShape
    heads_per_product: int

    @property
    def packed(self) -> bool:
        """Whether two query heads share a row of lanes."""
        return self.shape.pages.shares_plane and self.shape.heads_per_kv_head % 2 == 0

    @property
    def num_products(self) -> int:
        """Products of queries with keys, and of weights with values."""
        return self.shape.pages.num_kv_heads // self.heads_per_product

    @property
    def rows_per_product(self) -> int:
        """Query heads of one product."""
        return self.heads_per_product * self.shape.heads_per_kv_head

    @property
    def query_shape(self) -> tuple[int, int]:
        """Rows and lanes of one sequence's queries."""
        heads = self.shape.num_heads
        return (heads // 2, LANES) if self.packed else (heads, self.shape.pages.key_planes * LANES)

    @property
    def output_shape(self) -> tuple[int, int]:
        """Rows and lanes of one sequence's outputs."""
        heads = self.shape.num_heads
        return (heads // 2, LANES) if self.packed else (heads, self.shape.pages.value_planes * LANES)

    # ------------------------------------------------------------------ outside the kernel

    def pack_queries(self, queries: jax.Array) -> jax.Array:
        """Queries [S, H, Dk] as the kernel takes them, [S, *query_shape]."""
        rows, lanes = self.query_shape
        width = HALF if self.packed else lanes
        padded = jnp.pad(queries, ((0, 0), (0, 0), (0, width - queries.shape[-1])))
        return padded.reshape(-1, rows, lanes)

    def unpack_outputs(self, outputs: jax.Array) -> jax.Array:
        """Outputs [S, *output_shape] of the kernel as [S, H, Dv]."""
        by_head = outputs.reshape(outputs.shape[0], self.shape.num_heads, -1)
        # A shared plane has the value in its upper half; packed rows have only values.
        begin = 0 if self.packed else self.shape.pages.value_lane
        return by_head[..., begin : begin + self.shape.pages.value_dim]

    def pack_sinks(self, sinks: jax.Array) -> jax.Array:
        """Sinks [H] in the order of score rows, f32[H, 128], the same in every lane."""
        ordered = sinks.astype(jnp.float32)
        if self.packed:
            # Score rows of a product: the heads of lower halves, then those of upper halves.
            ordered = ordered.reshape(self.num_products, -1, 2).swapaxes(1, 2).reshape(-1)
        return jnp.broadcast_to(ordered[:, None], (self.shape.num_heads, LANES))

    # ------------------------------------------------------------------ inside the kernel

    def product_queries(self, load: Callable[[int, int], jax.Array], product: int, dtype: jnp.dtype) -> jax.Array:
        """The block-diagonal queries of a product, [rows_per_product, contracted lanes].

        Args:
            load: gives rows [begin, end) of the sequence's packed queries.
            product: which.
            dtype: of the result.
        """
        rows = self.rows_per_product // 2 if self.packed else self.rows_per_product
        queries = load(product * rows, (product + 1) * rows)
        if not (self.packed or self.heads_per_product > 1):
            return queries.astype(dtype)
        queries = queries.astype(jnp.float32)
        if self.packed:
            # V lanes get zero: they meet values there.
            low = _lanes_of(queries) < HALF
            upper = pltpu.roll(queries, HALF, 1)
            halves = [jnp.where(low, part, 0.0) for part in (queries, upper)]
        else:
            halves = [queries]
        diagonal = [self._on_diagonal(half) for half in halves]
        return jnp.concatenate(diagonal, axis=0).astype(dtype)

    def _on_diagonal(self, queries: jax.Array) -> jax.Array:
        if self.heads_per_product == 1:
            return queries
        head = _head_of_row(queries, self.heads_per_product)
        blocks = [jnp.where(head == i, queries, 0.0) for i in range(self.heads_per_product)]
        return jnp.concatenate(blocks, axis=1)

    def product_keys(self, plane: Callable[[int], jax.Array], product: int) -> jax.Array:
        """The keys of a product's heads side by side, [T, contracted lanes]; ``plane`` gives a plane [T, 128]."""
        pages = self.shape.pages
        return self._side_by_side(plane, product, pages.first_key_plane, pages.key_planes)

    def product_values(self, plane: Callable[[int], jax.Array], product: int) -> jax.Array:
        """The values of a product's heads side by side, [T, lanes]."""
        pages = self.shape.pages
        return self._side_by_side(plane, product, pages.first_value_plane, pages.value_planes)

    def _side_by_side(
        self, plane: Callable[[int], jax.Array], product: int, first: Callable[[int], int], count: int
    ) -> jax.Array:
        heads = range(product * self.heads_per_product, (product + 1) * self.heads_per_product)
        parts = [plane(first(head) + i) for head in heads for i in range(count)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    def diagonal(self, weighted: jax.Array) -> jax.Array:
        """What is meant of a product's f32 [rows_per_product, lanes of all its heads]: each row's own head's lanes."""
        if self.heads_per_product == 1:
            return weighted
        rows = weighted.shape[0] // 2 if self.packed else weighted.shape[0]
        parts = [weighted[begin : begin + rows] for begin in range(0, weighted.shape[0], rows)]
        chosen = [self._on_own_lanes(part) for part in parts]
        return chosen[0] if len(chosen) == 1 else jnp.concatenate(chosen, axis=0)

    def _on_own_lanes(self, weighted: jax.Array) -> jax.Array:
        lanes = weighted.shape[1] // self.heads_per_product
        chosen = weighted[:, :lanes]
        head = _head_of_row(chosen, self.heads_per_product)
        for i in range(1, self.heads_per_product):
            chosen = jnp.where(head == i, weighted[:, i * lanes : (i + 1) * lanes], chosen)
        return chosen

    def by_row(self, of_heads: Sequence[jax.Array], rows: int) -> jax.Array:
        """What differs by kv head of a product, [1, lanes] each, laid out as the product's rows are, [rows, lanes]."""
        if len(of_heads) == 1:
            return of_heads[0]
        halves = 2 if self.packed else 1
        part = jnp.broadcast_to(of_heads[0], (rows // halves, of_heads[0].shape[1]))
        head = _head_of_row(part, self.heads_per_product)
        for i in range(1, self.heads_per_product):
            part = jnp.where(head == i, of_heads[i], part)
        return part if halves == 1 else jnp.concatenate([part] * halves, axis=0)

    def pack_outputs(self, outputs: jax.Array) -> jax.Array:
        """From a product's f32 [rows_per_product, lanes of a head] to its rows of ``output_shape``."""
        if not self.packed:
            return outputs
        half = outputs.shape[0] // 2
        lower, upper = outputs[:half], outputs[half:]
        return jnp.where(_lanes_of(upper) < HALF, pltpu.roll(lower, HALF, 1), upper)


def _lanes_of(values: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, values.shape, 1)


def _head_of_row(values: jax.Array, heads: int) -> jax.Array:
    """Which of the product's kv heads each row belongs to."""
    rows_per_head = values.shape[0] // heads
    row = lax.broadcasted_iota(jnp.int32, values.shape, 0)
    head = jnp.zeros_like(row)
    for i in range(1, heads):
        head += (row >= i * rows_per_head).astype(jnp.int32)
    return head
