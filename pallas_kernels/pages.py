"""How keys and values of one layer lie in a page of the pool, as the kernels see it.

A page is ``[C, P, 128]``: planes of 128 lanes, head after head, K planes before V planes. Where K and V of a head are
at most 64 wide they share one plane, V from lane 64. Dims between are padded to the lanes; what lies in the padding is
never looked at, since queries are zero there and outputs are cut.

Owns: that layout and the tile arithmetic that follows from it. Must never: know which page belongs to whom.

Axis letters: P token slots of a block, C planes of a page, K kv heads, D head dim, T tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

LANES = 128
"""Elements of one row of a plane: the width of a vector register."""

NO_SLOT = 2**31 - 1
"""The slot of a token whose K/V goes nowhere; tested before any arithmetic, which would wrap."""


@dataclasses.dataclass(frozen=True)
class PageGeometry:
    """The page of one layer on one chip.

    Attributes:
        block_size: P, token slots of a page; a power of two, a multiple of ``row_tile`` of the K/V dtype.
        num_kv_heads: K, heads of this chip.
        key_dim: elements of a key, 1 to 512.
        value_dim: elements of a value, 1 to 512.
    """

    block_size: int
    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def shares_plane(self) -> bool:
        """Whether K and V of a head lie side by side in one plane."""
        return max(self.key_dim, self.value_dim) <= LANES // 2

    @property
    def key_planes(self) -> int:
        """Planes that hold a head's key (the shared one counts)."""
        return -(-self.key_dim // LANES)

    @property
    def value_planes(self) -> int:
        """Planes that hold a head's value (the shared one counts)."""
        return -(-self.value_dim // LANES)

    @property
    def planes_per_head(self) -> int:
        """Planes of one head."""
        return 1 if self.shares_plane else self.key_planes + self.value_planes

    @property
    def num_planes(self) -> int:
        """C, planes of a page."""
        return self.num_kv_heads * self.planes_per_head

    @property
    def rows(self) -> int:
        """Rows of 128 lanes in a page."""
        return self.num_planes * self.block_size

    @property
    def value_lane(self) -> int:
        """The lane of its first plane at which a value begins."""
        return LANES // 2 if self.shares_plane else 0

    def first_key_plane(self, head: int) -> int:
        """The plane in which the key of a kv head begins."""
        return head * self.planes_per_head

    def first_value_plane(self, head: int) -> int:
        """The plane in which the value of a kv head begins."""
        return head * self.planes_per_head + (0 if self.shares_plane else self.key_planes)


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What is static of one layer's attention on one chip.

    Attributes:
        pages: where K/V lie.
        num_heads: H, query heads; a multiple of the kv heads, head h reads kv head h // (H / K).
        window: W in tokens, the query itself included; ``None`` sees everything before.
        scale: scores are q·k times this.
        soft_cap: scores become cap·tanh(score / cap); ``None`` for none.
    """

    pages: PageGeometry
    num_heads: int
    window: int | None
    scale: float
    soft_cap: float | None = None

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that read one kv head."""
        return self.num_heads // self.pages.num_kv_heads

    @property
    def table_width(self) -> int:
        """M of a windowed layer: blocks that W tokens can touch, wherever the window begins in a block."""
        assert self.window is not None
        return -(-(self.window - 1) // self.pages.block_size) + 1


def row_tile(dtype: jnp.dtype) -> int:
    """Rows that memory is moved in: 8, 16 or 32 for values of 4, 2 or 1 bytes."""
    return 32 // jnp.dtype(dtype).itemsize


SMALLEST_WRITE_ROWS = 8

PACKS_ROWS_IN_PLACE = ("TPU v4", "TPU v5", "TPU v6")
"""Chips whose tiles of 32- and 16-bit values have 8 rows; on others those of 16 bits have 16. Bytes come by 32."""


def write_rows(dtype: jnp.dtype) -> int:
    """Rows of a plane that must be written for one token, on the chip that the trace is for where that is known."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    kind = str(getattr(device, "device_kind", ""))
    in_place = kind.startswith(PACKS_ROWS_IN_PLACE) and jnp.dtype(dtype).itemsize > 1
    return SMALLEST_WRITE_ROWS if in_place else row_tile(dtype)


def as_pages(arena: jax.Array, pages: PageGeometry) -> jax.Array:
    """The arena ``[1, rows, 128]`` of one chip as ``[num_pages, C, P, 128]``; a bitcast."""
    return arena.reshape(-1, pages.num_planes, pages.block_size, LANES)


def token_planes(keys: jax.Array, values: jax.Array, pages: PageGeometry) -> jax.Array:
    """Rows of new tokens as they lie in a page: keys [T, K, Dk] and values [T, K, Dv] to [T, C, 128], padding 0."""
    tokens = keys.shape[0]
    half = LANES // 2
    key_lanes, value_lanes = (
        (half, half) if pages.shares_plane else (pages.key_planes * LANES, pages.value_planes * LANES)
    )
    padded = (
        jnp.pad(keys, ((0, 0), (0, 0), (0, key_lanes - pages.key_dim))),
        jnp.pad(values, ((0, 0), (0, 0), (0, value_lanes - pages.value_dim))),
    )
    return jnp.concatenate(padded, axis=-1).reshape(tokens, pages.num_planes, LANES)


def by_token(values: jax.Array, lanes: int, first_lane: int = 0) -> jax.Array:
    """[T, H, D] as [T, H · lanes], each head from its ``first_lane`` on, zeros around."""
    padded = jnp.pad(values, ((0, 0), (0, 0), (first_lane, lanes - first_lane - values.shape[-1])))
    return padded.reshape(values.shape[0], -1)


def own_rows(
    keys: jax.Array, values: jax.Array, pages: PageGeometry
) -> tuple[list[jax.Array], tuple[tuple[int, int], ...]]:
    """New tokens by row, lanes as in planes, without laying K and V side by side where they have planes of their own.

    Args:
        keys: [T, K, Dk].
        values: [T, K, Dv].
        pages: where they will lie.

    Returns:
        arrays [T, lanes], and for each plane of a page which array has it and from which lane on.
    """
    heads = range(pages.num_kv_heads)
    if pages.shares_plane:
        together = token_planes(keys, values, pages).reshape(keys.shape[0], -1)
        return [together], tuple((0, head * LANES) for head in heads)
    counts = (pages.key_planes, pages.value_planes)
    arrays = [by_token(x, count * LANES) for x, count in zip((keys, values), counts, strict=True)]
    planes = [
        (array, (head * count + i) * LANES)
        for head in heads
        for array, count in enumerate(counts)
        for i in range(count)
    ]
    return arrays, tuple(planes)
