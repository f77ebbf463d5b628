"""The static plan of a prefill kernel: how queries, heads and keys are cut.

Owns: the choice of tiles and what they take of VMEM. Must never: touch an array.

Axis letters: T tokens, H query heads, K kv heads, G query heads a kv head, R rows of scores (queries times G), N keys
of a tile, P token slots of a block.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pallas_kernels.pages import LANES, AttentionShape, row_tile
from pallas_kernels.scales import is_scaled
from pallas_kernels.tiles import overrides

ROWS = 1024
"""Rows of scores that one turn of the loops has to work on: fewer, and the units wait for one another."""

KEYS = 256
"""Keys of a tile."""

STREAM_KEYS = 2048
"""Keys that lie in VMEM at once where the context has no end."""

VMEM_BYTES = 48 << 20
"""What a plan may take of VMEM; 64 MiB a core is the least that a supported chip has."""

HALF = LANES // 2


@dataclasses.dataclass(frozen=True)
class PrefillTile:
    """How a prefill kernel cuts its work.

    Attributes:
        shape: the attention.
        num_tokens: T of the step.
        queries: tokens of a query tile; divides T.
        heads: kv heads worked on at once; divides K.
        keys: N, keys of a tile; a multiple of 128 and of P, or P of it.
        held_keys: keys in VMEM for one query tile, a multiple of ``keys`` and of P.
        plain_tiles: tiles without an edge that are scored in one go.
        weighed_tiles: tiles that are weighed in one go.
        kv_dtype: of the pool and of the new keys and values.
        compute_dtype: of both operands of the products.
    """

    shape: AttentionShape
    num_tokens: int
    queries: int
    heads: int
    keys: int
    held_keys: int
    plain_tiles: int
    weighed_tiles: int
    kv_dtype: jnp.dtype
    compute_dtype: jnp.dtype

    @property
    def block(self) -> int:
        """P."""
        return self.shape.pages.block_size

    @property
    def group(self) -> int:
        """G."""
        return self.shape.heads_per_kv_head

    @property
    def rows(self) -> int:
        """R, rows of scores of one kv head."""
        return self.queries * self.group

    @property
    def head_groups(self) -> int:
        """Groups of kv heads."""
        return self.shape.pages.num_kv_heads // self.heads

    @property
    def planes(self) -> int:
        """Planes of a page that a group of heads reads."""
        return self.heads * self.shape.pages.planes_per_head

    @property
    def packed(self) -> bool:
        """Whether two query heads share a row of lanes on their way in and out."""
        return self.shape.pages.shares_plane and self.group % 2 == 0

    @property
    def query_lanes(self) -> int:
        """Lanes of one query head as it comes in."""
        return HALF if self.packed else self.shape.pages.key_planes * LANES

    @property
    def output_lanes(self) -> int:
        """Lanes of one query head as it goes out."""
        return HALF if self.packed else self.shape.pages.value_planes * LANES

    @property
    def own_tokens(self) -> int:
        """Tokens of one copy of the step's own keys."""
        return self.queries

    @property
    def reads_own(self) -> bool:
        """Whether keys of the step come from the activations."""
        return self.shape.window is not None

    @property
    def scaled(self) -> bool:
        """Whether K/V are integers with scales."""
        return is_scaled(self.kv_dtype)

    @property
    def one_pass(self) -> bool:
        """Whether all keys of a query tile are held at once, so that no sums need rescaling."""
        return self.reads_own and self.held_keys >= _window_keys(self.shape, self.queries, self.own_tokens)

    @property
    def vmem_bytes(self) -> int:
        """What the kernel's scratch takes of VMEM."""
        pages, item = self.shape.pages, jnp.dtype(self.compute_dtype).itemsize
        key_lanes, value_lanes = pages.key_planes * LANES, pages.value_planes * LANES
        in_and_out = 2 * self.queries * self.group * (self.query_lanes + self.output_lanes) * 4
        of_rows = self.rows * (key_lanes * item + 4 * (self.held_keys + 3 * LANES + value_lanes))
        kv = 2 * self.planes * self.held_keys * LANES * jnp.dtype(self.kv_dtype).itemsize
        if self.scaled:
            kv += 4 * (4 * self.planes + 2 * self.heads) * (self.held_keys + LANES)
        return kv + self.heads * (in_and_out + of_rows) + 4 * self.queries * self.keys

    def check(self) -> None:
        """Raises an assertion where the parts do not fit together."""
        assert self.num_tokens % self.queries == 0, (self.num_tokens, self.queries)
        assert self.queries % row_tile(self.compute_dtype) == 0, self.queries
        assert self.shape.pages.num_kv_heads % self.heads == 0, self.heads
        assert self.keys % LANES == 0 and (self.keys % self.block == 0 or self.block % self.keys == 0), self.keys
        assert self.held_keys % self.keys == 0 and self.held_keys % self.block == 0, self.held_keys
        assert self.held_keys % self.own_tokens == 0, self.held_keys


def _window_keys(shape: AttentionShape, queries: int, own_tokens: int) -> int:
    """Most keys that a query tile of a windowed layer fetches, whole blocks and whole copies."""
    assert shape.window is not None
    return shape.window - 1 + queries + 2 * shape.pages.block_size + 2 * own_tokens


def choose_tile(shape: AttentionShape, num_tokens: int, kv_dtype: jnp.dtype, query_dtype: jnp.dtype) -> PrefillTile:
    """The plan for a step of ``num_tokens`` tokens, a power of two of at least 16."""
    kv_heads, compute = shape.pages.num_kv_heads, jnp.promote_types(kv_dtype, query_dtype)
    queries = min(num_tokens, 256, max(64, ROWS // _power_of_two(shape.heads_per_kv_head)))
    # What too few tiles do not give the units to do, more heads do.
    tiles = 4 if shape.window is None else -(-(shape.window + queries) // KEYS)
    most_heads = max(1, ROWS * -(-4 // tiles) // (queries * shape.heads_per_kv_head))
    heads = [n for n in range(min(most_heads, kv_heads), 0, -1) if kv_heads % n == 0]
    if is_scaled(kv_dtype):
        # Whole rows of scales belong to a group of heads; all heads of a page have some.
        whole = [
            n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n * shape.pages.rows // kv_heads % LANES == 0
        ]
        heads = [n for n in heads if n in whole] or whole[:1]
    wanted = STREAM_KEYS if shape.window is None else _window_keys(shape, queries, queries)
    unit = max(KEYS, shape.pages.block_size)
    for held in (
        -(-wanted // unit) * unit,
        *(n for n in (STREAM_KEYS, STREAM_KEYS // 2, 2 * unit, unit) if n < wanted),
    ):
        # Of a window and its queries, tiles lie on an edge at either end.
        of_unit = min(tiles, held // KEYS) if shape.window is not None else held // KEYS
        runs = (min(4, max(1, of_unit - 2)), min(5, of_unit))
        dtypes = jnp.dtype(kv_dtype), jnp.dtype(compute)
        for count in heads:
            tile = PrefillTile(shape, num_tokens, queries, count, KEYS, held, *runs, *dtypes)
            if tile.vmem_bytes <= VMEM_BYTES:
                kernel = "paged_prefill" if shape.window is None else "windowed_prefill"
                tile = dataclasses.replace(tile, **overrides(kernel, shape))  # type: ignore[arg-type]
                tile.check()
                return tile
    raise ValueError(
        f"{shape}: no plan of prefill fits {VMEM_BYTES} bytes of vector memory in blocks of {shape.pages.block_size} "
        "tokens; smaller blocks need less"
    )


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
