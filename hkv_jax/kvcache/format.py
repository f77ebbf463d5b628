"""The shape and size of a page, the part of a KV block that belongs to one layer.

Owns: page layouts, NO_SLOT, the arithmetic from shapes to bytes, default block sizes. Must never: import jax or
know the budget.

Axis letters: P token slots per block, K kv heads on one chip, D head dim, C planes of a page.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence

from hkv_jax.errors import ConfigError
from hkv_jax.spec import KVGroupSpec, LayerKind

NO_SLOT = 2**31 - 1
"""The slot of a token whose K/V goes nowhere. Tested before any arithmetic: ``NO_SLOT + 1`` wraps in i32."""

LANES = 128
"""Elements of one row of a plane: the width of a TPU vector register."""

SCALE_BYTES = 4
"""Of the scale of a row of 128 integers; where K and V share the row, of both scales."""

MAX_BLOCK_SIZE = 4096
"""Tokens; larger blocks would waste more than any table they spare."""

SMALL_PAGE_BYTES = 32 * 1024
"""Below this many bytes a page of 64 tokens is too short a DMA, so the block is doubled."""


class PageLayout(enum.StrEnum):
    """How the K/V of one layer lie in a page; it follows the attention backend, not the platform."""

    ROWS = "rows"
    """``[2, P, K*D]``: all K, then all V (plain XLA)."""

    PLANES = "planes"
    """``[C, P, 128]``: planes of 128 lanes, head after head, K planes before V planes (Pallas)."""


@dataclasses.dataclass(frozen=True, slots=True)
class KVFormat:
    """The page of one group on one chip.

    ``block_size`` is P in tokens, ``num_kv_heads`` K counts the heads of one chip, ``itemsize`` is in bytes,
    ``num_layers`` are the layers whose pages make a block.
    """

    layout: PageLayout
    block_size: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    num_layers: int

    @property
    def planes_per_head(self) -> int:
        """``PLANES``: planes of one head; one when K and V are short enough to share it (V from lane 64)."""
        return 1 if 2 * self.head_dim <= LANES else 2 * math.ceil(self.head_dim / LANES)

    @property
    def num_planes(self) -> int:
        """First axis of a page: C, or 2 (K and V) in ``ROWS``."""
        return 2 if self.layout is PageLayout.ROWS else self.num_kv_heads * self.planes_per_head

    @property
    def row_elements(self) -> int:
        """Last axis of a page: elements of one row."""
        return self.num_kv_heads * self.head_dim if self.layout is PageLayout.ROWS else LANES

    @property
    def rows_per_page(self) -> int:
        """Rows of one page, over all its planes."""
        return self.num_planes * self.block_size

    @property
    def page_elements(self) -> int:
        """Elements of one page."""
        return self.rows_per_page * self.row_elements

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, with the scale of a row of integers."""
        return self.row_elements * self.itemsize + (SCALE_BYTES if self.has_scales else 0)

    @property
    def has_scales(self) -> bool:
        """Whether K/V are integers of 8 bits, each row of which has a scale in an array beside the arena."""
        return self.itemsize == 1

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, with its scales."""
        return self.rows_per_page * self.row_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: one page a layer."""
        return self.num_layers * self.page_bytes


def row_tile(itemsize: int) -> int:
    """Rows of the smallest tile memory is moved in: 8, 16 or 32 for values of 4, 2 or 1 bytes."""
    return 32 // itemsize


def kv_heads_per_chip(num_kv_heads: int, tensor_parallel: int) -> int:
    """The kv heads each of ``tensor_parallel`` chips holds; replicated where there are fewer heads than chips.

    Raises:
        ConfigError: neither number divides the other.
    """
    if num_kv_heads % tensor_parallel and tensor_parallel % num_kv_heads:
        raise ConfigError(
            f"tensor_parallel_size {tensor_parallel} does not fit {num_kv_heads} kv heads: one must divide the other"
        )
    return max(1, num_kv_heads // tensor_parallel)


def default_block_sizes(
    groups: Sequence[KVGroupSpec], layout: PageLayout, itemsize: int, tensor_parallel: int = 1
) -> dict[str, int]:
    """Tokens per block of each group, by name.

    A window spans about sixteen blocks, so that little more than the window is held and read; a global block is at
    least as large as any sliding one, since prefixes are matched in whole blocks of every group. Blocks of integers
    have whole rows of scales.
    """
    sizes = {
        group.name: max(
            _window_block_size(group.window, itemsize), least_block_size(group, layout, itemsize, tensor_parallel)
        )
        for group in groups
        if group.window is not None
    }
    largest = max(sizes.values(), default=0)
    for group in groups:
        if group.kind is LayerKind.GLOBAL:
            heads = kv_heads_per_chip(group.num_kv_heads, tensor_parallel)
            least = least_block_size(group, layout, itemsize, tensor_parallel)
            sizes[group.name] = max(largest, least, _global_block_size(group, layout, itemsize, heads))
    return sizes


def least_block_size(group: KVGroupSpec, layout: PageLayout, itemsize: int, tensor_parallel: int) -> int:
    """The smallest block, in tokens, that a layout can hold of a group: a tile of rows, and whole rows of scales."""
    if layout is PageLayout.ROWS:
        return 1
    least = row_tile(itemsize)
    if itemsize > 1:
        return least
    heads = kv_heads_per_chip(group.num_kv_heads, tensor_parallel)
    planes = KVFormat(layout, least, heads, group.head_dim, itemsize, group.num_layers).num_planes
    return max(least, LANES // math.gcd(planes, LANES))


def _window_block_size(window: int, itemsize: int) -> int:
    power_of_two: int = 1 << (max(16, window // 16).bit_length() - 1)
    return max(row_tile(itemsize), min(128, power_of_two))


def _global_block_size(group: KVGroupSpec, layout: PageLayout, itemsize: int, heads: int) -> int:
    if layout is PageLayout.ROWS:
        return 32
    page = KVFormat(layout, 64, heads, group.head_dim, itemsize, group.num_layers)
    return 64 if page.page_bytes >= SMALL_PAGE_BYTES else 128


def choose_block_sizes(
    groups: Sequence[KVGroupSpec], given: Mapping[str, int], layout: PageLayout, itemsize: int, tensor_parallel: int
) -> dict[str, int]:
    """Tokens per block of each group: ``given`` by the name of a group or of a kind of layer, defaults for the rest.

    A default follows what is given: a global block is never smaller than a sliding one.

    Raises:
        ConfigError: an unknown name, a size that is no power of two or that the layout cannot hold, or global blocks
            given smaller than sliding ones.
    """
    known = {name for group in groups for name in (group.name, str(group.kind))}
    for name, size in given.items():
        if name not in known:
            raise ConfigError(f"block_size: no group is called {name!r}; this model has {', '.join(sorted(known))}")
        least = max(
            least_block_size(g, layout, itemsize, tensor_parallel) for g in groups if name in (g.name, str(g.kind))
        )
        _check_block_size(name, size, least)
    chosen = {g.name: given.get(g.name, given.get(str(g.kind), 0)) for g in groups}
    defaults = default_block_sizes(groups, layout, itemsize, tensor_parallel)
    is_global = {group.name: group.kind is LayerKind.GLOBAL for group in groups}
    given_globals = [size for name, size in chosen.items() if is_global[name] and size]
    sizes = {n: chosen[n] or min([defaults[n], *given_globals]) for n in chosen if not is_global[n]}
    largest = max(sizes.values(), default=0)
    for name in chosen:
        if is_global[name]:
            sizes[name] = chosen[name] or max(largest, defaults[name])
            if sizes[name] < largest:
                raise ConfigError(
                    f"block_size: global blocks ({name}={sizes[name]}) must not be smaller than sliding ones "
                    f"({largest}); give {name}={largest} or smaller sliding blocks"
                )
    return sizes


def _check_block_size(name: str, size: int, least: int) -> None:
    if not least <= size <= MAX_BLOCK_SIZE or size & (size - 1):
        raise ConfigError(f"block_size: {name}={size} must be a power of two from {least} to {MAX_BLOCK_SIZE}")
