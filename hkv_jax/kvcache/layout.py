"""From a budget in bytes to the layout of the KV cache: arenas, slabs, and the pool of each group.

Owns: ``LayoutRequest``, ``KVLayout`` and the words of every refusal at start. Must never: import jax, or guess a
budget. The arithmetic of the split is in ``partition``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hkv_jax.errors import ConfigError
from hkv_jax.kvcache.format import NO_SLOT, KVFormat, PageLayout, choose_block_sizes, kv_heads_per_chip
from hkv_jax.kvcache.partition import Partition, PoolNeed, partition_budget, smallest_budget
from hkv_jax.spec import KVGroupSpec

logger = logging.getLogger(__name__)

DEFAULT_EXPECTED_LENGTH = 8192
"""Expected tokens of a sequence when nobody says, or eight times the largest window where that is more."""


@dataclasses.dataclass(frozen=True)
class LayoutRequest:
    """What the layout is computed from.

    Attributes:
        groups: the model's KV groups; kv heads are the model's, not a chip's.
        budget_bytes: KV bytes of one device.
        max_model_len: longest sequence in tokens, prompt and output; ``None``: as long as is sensible.
        config_max_len: longest sequence the model's config allows, in tokens.
        expected_average_seq_length: E in tokens, prompt and output; ``None``: by the model.
        block_sizes: tokens by name of a group (or of a kind of layer); those left out follow.
        partition: ``moving``, one arena for all groups, or ``static``, one for each kind of attention.
        itemsize: bytes of one K or V element.
        max_chunk: most tokens of one sequence in a step.
        max_num_seqs: most sequences running at once.
    """

    groups: tuple[KVGroupSpec, ...]
    budget_bytes: int
    max_model_len: int | None
    config_max_len: int
    expected_average_seq_length: int | None
    block_sizes: Mapping[str, int]
    partition: str
    page_layout: PageLayout
    itemsize: int
    tensor_parallel: int
    max_chunk: int
    max_num_seqs: int


@dataclasses.dataclass(frozen=True)
class ArenaLayout:
    """One preallocated array of one chip: ``num_slabs`` slabs of ``slab_bytes`` bytes, elements of ``itemsize``."""

    slab_bytes: int
    num_slabs: int
    itemsize: int

    @property
    def total_bytes(self) -> int:
        """Bytes of the array on one chip."""
        return self.slab_bytes * self.num_slabs


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """Where the blocks of one group lie.

    Attributes:
        arena: index into ``KVLayout.arenas``.
        blocks_per_slab, pages_per_slab: of this group's blocks and pages, in a slab of its arena.
        table_width: columns of a lane's row of the device's table. Block number n is in column ``n % table_width``,
            which in a global group is n itself.
        floor_blocks: what one sequence of ``max_model_len`` tokens may hold at once.
        reserve_blocks: what the group never goes below.
        demand_blocks: what a sequence of the expected length holds.
        initial_slabs: slabs of its arena the group owns at start.
    """

    spec: KVGroupSpec
    format: KVFormat
    arena: int
    blocks_per_slab: int
    pages_per_slab: int
    table_width: int
    floor_blocks: int
    reserve_blocks: int
    demand_blocks: int
    initial_slabs: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        """Blocks of the group at start."""
        return len(self.initial_slabs) * self.blocks_per_slab

    @property
    def num_tokens(self) -> int:
        """Token slots of the group at start."""
        return self.num_blocks * self.format.block_size

    @property
    def num_bytes(self) -> int:
        """Bytes of the group's blocks at start, on one chip; what a slab cannot hold of a block is not counted."""
        return self.num_blocks * self.format.block_bytes

    @property
    def reserve_slabs(self) -> int:
        """Slabs the group never goes below."""
        return -(-self.reserve_blocks // self.blocks_per_slab)

    def page(self, block: int) -> int:
        """Page of layer 0 of a block; that of the group's layer l is l further."""
        slab, index = divmod(block, self.blocks_per_slab)
        return slab * self.pages_per_slab + index * self.format.num_layers

    def pages(self, block_ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Pages of layer 0 of blocks, the shape of ``block_ids``."""
        slabs, indices = np.divmod(block_ids, self.blocks_per_slab)
        pages: NDArray[np.int32] = (slabs * self.pages_per_slab + indices * self.format.num_layers).astype(np.int32)
        return pages

    def blocks_of_sequence(self, num_tokens: int) -> int:
        """Most blocks a sequence holds at once on its way to ``num_tokens`` tokens."""
        return min(self.floor_blocks, -(-num_tokens // self.format.block_size))


class PoolRow(NamedTuple):
    """One group's pool at start, for printing: its size in blocks, tokens, bytes on one chip, and MiB."""

    name: str
    num_blocks: int
    num_tokens: int
    num_bytes: int
    mebibytes: float


@dataclasses.dataclass(frozen=True)
class KVLayout:
    """The whole cache: which arenas there are, and where each group lives.

    ``max_model_len`` and ``expected_seq_length`` (E) are in tokens; ``max_num_sequences_of_expected`` sequences of E
    tokens fit at start.
    """

    arenas: tuple[ArenaLayout, ...]
    groups: tuple[GroupLayout, ...]
    max_model_len: int
    expected_seq_length: int
    partition: str

    @property
    def max_num_sequences_of_expected(self) -> int:
        """How many sequences of ``expected_seq_length`` tokens the pools hold at start."""
        return min(group.num_blocks // group.demand_blocks for group in self.groups)

    @property
    def total_bytes(self) -> int:
        """Bytes of all arenas on one chip."""
        return sum(arena.total_bytes for arena in self.arenas)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens per block of each group."""
        return tuple(group.format.block_size for group in self.groups)

    @property
    def largest_block_size(self) -> int:
        """P_max: the largest block size of a group, in tokens."""
        return max(self.block_sizes)

    def describe(self) -> list[PoolRow]:
        """The pools in the order of ``groups``."""
        return [PoolRow(g.spec.name, g.num_blocks, g.num_tokens, g.num_bytes, g.num_bytes / 2**20) for g in self.groups]

    def all_global_bytes(self, num_tokens: int) -> int:
        """Bytes on one chip that ``num_tokens`` tokens of one sequence would take if no block ever left a window."""
        return sum(-(-num_tokens // g.format.block_size) * g.format.block_bytes for g in self.groups)


def most_window_blocks(window: int, block_size: int, chunk: int) -> int:
    """Most blocks one sequence holds in a sliding group while it runs a chunk of that many tokens.

    One token (or none): the window of W tokens, wherever it starts in a block. More: the window before the chunk, and
    what of the chunk the next window needs.
    """
    before = -(-(window - 1) // block_size)
    if chunk <= 1:
        return before + 1
    return before + -(-min(chunk, window - 1) // block_size) + 2


def plan_layout(request: LayoutRequest) -> KVLayout:
    """Splits the budget into arenas, slabs and pools.

    Without a ``max_model_len`` it is the model's own, or the longest whose floors take half the memory; one that was
    asked for may take all of it.

    Raises:
        ConfigError: a value is out of range, or memory does not suffice; the message says what would.
    """
    _check(request)
    formats = _formats(request)
    max_model_len, parts = request.max_model_len, 1
    if max_model_len is None:
        max_model_len, parts = _default_length(request, formats)
    needs = _needs(request, formats, max_model_len)
    partition = partition_budget(needs, request.budget_bytes, parts)
    if partition is None:
        raise ConfigError(_too_small(request, formats, max_model_len))
    expected = _expected_length(request, max_model_len)
    wanted = request.expected_average_seq_length
    if wanted is not None and wanted > expected:
        logger.warning("EXPECTED_AVERAGE_SEQ_LENGTH %d is more than max_model_len; %d is used", wanted, expected)
    layout = KVLayout(
        arenas=_arenas(needs, partition, request.itemsize),
        groups=_group_layouts(request, formats, needs, partition, max_model_len),
        max_model_len=max_model_len,
        expected_seq_length=expected,
        partition=request.partition,
    )
    _check_addresses(layout)
    return layout


def least_bytes(request: LayoutRequest) -> int:
    """Bytes on one chip that just hold one sequence of ``request.max_model_len`` tokens; the budget is not read."""
    return smallest_budget(_needs(request, _formats(request), request.max_model_len or request.config_max_len))


def most_useful_bytes(request: LayoutRequest) -> int:
    """Bytes on one chip beyond which more KV memory serves nobody: ``max_num_seqs`` sequences of the longest length.

    ``budget_bytes`` is not read. Always enough for one such sequence; for more, rounding to slabs is not included.
    """
    length = request.max_model_len or request.config_max_len
    total = 0
    for group, kv_format in zip(request.groups, _formats(request), strict=True):
        size = kv_format.block_size
        floor, steady = _floor_blocks(group, size, request.max_chunk, length), -(-length // size)
        if group.window is not None:
            steady = min(steady, most_window_blocks(group.window, size, 1) + 1)
        total += (steady * (request.max_num_seqs - 1) + floor) * kv_format.block_bytes
    return max(total, least_bytes(request))


def _check(request: LayoutRequest) -> None:
    for name in ("budget_bytes", "config_max_len", "max_chunk", "max_num_seqs", "tensor_parallel"):
        if getattr(request, name) < 1:
            raise ConfigError(f"{name} must be at least 1, is {getattr(request, name)}")
    if request.partition not in ("moving", "static"):
        raise ConfigError(f"kv_partition must be moving or static, is {request.partition!r}")
    expected = request.expected_average_seq_length
    if expected is not None and expected < 1:
        raise ConfigError(f"EXPECTED_AVERAGE_SEQ_LENGTH must be a positive integer, is {expected}")
    length = request.max_model_len
    if length is not None and not 1 <= length <= request.config_max_len:
        raise ConfigError(f"max_model_len {length} must lie between 1 and the model's {request.config_max_len}")


def _formats(request: LayoutRequest) -> tuple[KVFormat, ...]:
    layout, itemsize, chips = request.page_layout, request.itemsize, request.tensor_parallel
    sizes = choose_block_sizes(request.groups, request.block_sizes, layout, itemsize, chips)
    return tuple(
        KVFormat(layout, sizes[g.name], kv_heads_per_chip(g.num_kv_heads, chips), g.head_dim, itemsize, g.num_layers)
        for g in request.groups
    )


def _floor_blocks(group: KVGroupSpec, block_size: int, max_chunk: int, max_model_len: int) -> int:
    whole = -(-max_model_len // block_size)
    return whole if group.window is None else min(whole, most_window_blocks(group.window, block_size, max_chunk))


def _expected_length(request: LayoutRequest, max_model_len: int) -> int:
    """E in tokens: as asked, or by the model's windows; never more than one sequence can have."""
    by_model = max(
        [DEFAULT_EXPECTED_LENGTH, *(8 * group.window for group in request.groups if group.window is not None)]
    )
    return min(max_model_len, request.expected_average_seq_length or by_model)


def _needs(request: LayoutRequest, formats: tuple[KVFormat, ...], max_model_len: int) -> list[PoolNeed]:
    expected = _expected_length(request, max_model_len)
    kinds = list(dict.fromkeys(group.kind for group in request.groups))
    needs = []
    for group, kv_format in zip(request.groups, formats, strict=True):
        size = kv_format.block_size
        floor = _floor_blocks(group, size, request.max_chunk, max_model_len)
        demand = -(-expected // size)
        if group.window is not None:
            demand = min(demand, most_window_blocks(group.window, size, 1))
        # Where the boundary moves, the oldest sequence can have all that others do not hold: a chunk's blocks will do.
        moves = request.partition == "moving" and group.window is None
        reserve = min(floor, -(-request.max_chunk // size) + 1) if moves else floor
        needs.append(
            PoolNeed(
                arena=kinds.index(group.kind) if request.partition == "static" else 0,
                page_bytes=kv_format.page_bytes,
                block_bytes=kv_format.block_bytes,
                floor_blocks=floor,
                reserve_blocks=reserve,
                demand_blocks=demand,
            )
        )
    return needs


def _longest(request: LayoutRequest, formats: tuple[KVFormat, ...], parts: int) -> int:
    """The longest ``max_model_len`` whose floors take at most one of ``parts`` parts of the budget; 0 if none does."""
    low, high = 0, request.config_max_len + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = partition_budget(_needs(request, formats, middle), request.budget_bytes, parts) is not None
        low, high = (middle, high) if fits else (low, middle)
    return low


def _default_length(request: LayoutRequest, formats: tuple[KVFormat, ...]) -> tuple[int, int]:
    for parts in (2, 1):
        length = _longest(request, formats, parts)
        if length:
            return length, parts
    raise ConfigError(_too_small(request, formats, request.config_max_len))


def _too_small(request: LayoutRequest, formats: tuple[KVFormat, ...], max_model_len: int) -> str:
    needed = smallest_budget(_needs(request, formats, max_model_len))
    longest = _longest(request, formats, 1)
    text = (
        f"kv_cache_memory: {request.budget_bytes} bytes per device do not hold one sequence of max_model_len "
        f"{max_model_len} tokens; give at least {needed} bytes ({needed / 2**20:.1f} MiB)"
    )
    if longest:
        return f"{text}, or max_model_len at most {longest}"
    least = smallest_budget(_needs(request, formats, 1))
    return f"{text}; the least that holds anything is {least} bytes"


def _arenas(needs: list[PoolNeed], partition: Partition, itemsize: int) -> tuple[ArenaLayout, ...]:
    num_slabs = [0] * len(partition.slab_bytes)
    for need, count in zip(needs, partition.group_slabs, strict=True):
        num_slabs[need.arena] += count
    return tuple(
        ArenaLayout(size, count, itemsize) for size, count in zip(partition.slab_bytes, num_slabs, strict=True)
    )


def _group_layouts(
    request: LayoutRequest,
    formats: tuple[KVFormat, ...],
    needs: list[PoolNeed],
    partition: Partition,
    max_model_len: int,
) -> tuple[GroupLayout, ...]:
    next_slab = [0] * len(partition.slab_bytes)
    layouts = []
    for group, kv_format, need, count in zip(request.groups, formats, needs, partition.group_slabs, strict=True):
        slab_bytes, first = partition.slab_bytes[need.arena], next_slab[need.arena]
        next_slab[need.arena] += count
        layouts.append(
            GroupLayout(
                spec=group,
                format=kv_format,
                arena=need.arena,
                blocks_per_slab=slab_bytes // kv_format.block_bytes,
                pages_per_slab=slab_bytes // kv_format.page_bytes,
                table_width=_table_width(group, kv_format.block_size, max_model_len),
                floor_blocks=need.floor_blocks,
                reserve_blocks=need.reserve_blocks,
                demand_blocks=need.demand_blocks,
                initial_slabs=tuple(range(first, first + count)),
            )
        )
    return tuple(layouts)


def _table_width(group: KVGroupSpec, block_size: int, max_model_len: int) -> int:
    whole = -(-max_model_len // block_size)
    return whole if group.window is None else min(whole, most_window_blocks(group.window, block_size, 1))


def _check_addresses(layout: KVLayout) -> None:
    """Slots and rows of an arena are i32 on the device, and the largest value is no slot."""
    for group in layout.groups:
        arena = layout.arenas[group.arena]
        num_rows = arena.num_slabs * group.pages_per_slab * group.format.rows_per_page
        if num_rows >= NO_SLOT:
            most = arena.total_bytes * (NO_SLOT - 1) // num_rows
            raise ConfigError(
                f"kv_cache_memory: an arena of {arena.total_bytes} bytes per device has {num_rows} rows of group "
                f"{group.spec.name}, more than the {NO_SLOT - 1} that can be addressed; give at most {most} bytes"
            )
