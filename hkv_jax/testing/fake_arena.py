"""The fake device's K/V: a number for every row of every layer, where the real device would keep the row.

Owns: where a slot lies in the memory that all groups share, and what a token's K/V is there: the fingerprint of the
token's prefix, marked where it was computed from a context that lacked something. Must never: know lanes or tables.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from hkv_jax.kvcache.layout import GroupLayout, KVLayout

Prints = NDArray[np.uint64]
"""Fingerprints."""

Ints = NDArray[np.int64]


def mixed(values: Prints) -> Prints:
    """Numbers that change all over when one bit of the given ones does (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class GroupPlaces:
    """Where a group's rows lie and when they are exact; U units a token, over all of the group's layers.

    Attributes:
        offsets i64[U]: units of a token relative to its row in layer 0.
        layers u64[U]: layer in the group of each unit.
        reach i64[U]: tokens by which the sliding layers below carry an error forward: K/V of a run that began at s
            without sliding context is exact from ``s + reach`` on.
        row_units: units of a row.
    """

    group: GroupLayout
    offsets: Ints
    layers: Prints
    reach: Ints
    row_units: int

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.group.format.block_size

    @property
    def window(self) -> int | None:
        """W in tokens; ``None`` for global."""
        return self.group.spec.window

    def indices(self, slots: Ints) -> Ints:
        """Units i64[n, U] of tokens at slots i64[n] of layer 0."""
        return slots[:, None] * self.row_units + self.offsets

    def block_slots(self, page: int) -> Ints:
        """Slots of the tokens of the block whose page of layer 0 this is."""
        return page * self.block_size + np.arange(self.block_size)


def carried_errors(layout: KVLayout) -> tuple[list[list[int]], int]:
    """Tokens by which an error is carried forward below each layer of each group, and below the model's output.

    A sliding layer of window W carries it W - 1 tokens; a global layer carries none, for it reads cached K/V.
    """
    below: list[list[int]] = [[] for _ in layout.groups]
    carried = 0
    layers = [(layer, number) for number, group in enumerate(layout.groups) for layer in group.spec.layers]
    for _, number in sorted(layers):
        below[number].append(carried)
        window = layout.groups[number].spec.window
        carried += 0 if window is None else window - 1
    return below, carried


def group_places(layout: KVLayout) -> list[GroupPlaces]:
    """The places of every group, in units of bytes that divide each row of an arena.

    Groups that overlap therefore destroy each other's content.
    """
    below, _ = carried_errors(layout)
    places = []
    for number, group in enumerate(layout.groups):
        row_units = _row_bytes(group) // unit_bytes(layout, group.arena)
        count = group.format.num_layers
        starts = np.arange(count)[:, None] * group.format.block_size * row_units + np.arange(row_units)
        layers = np.repeat(np.arange(count, dtype=np.uint64), row_units)
        reach = np.repeat(np.array(below[number], np.int64), row_units)
        places.append(GroupPlaces(group, starts.reshape(-1), layers, reach, row_units))
    return places


def empty_arenas(layout: KVLayout) -> list[Prints]:
    """The units of each arena."""
    return [
        np.zeros(arena.total_bytes // unit_bytes(layout, index), np.uint64) for index, arena in enumerate(layout.arenas)
    ]


def unit_bytes(layout: KVLayout, arena: int) -> int:
    """Bytes of a unit of an arena."""
    return math.gcd(*(_row_bytes(group) for group in layout.groups if group.arena == arena))


def _row_bytes(group: GroupLayout) -> int:
    return group.format.page_bytes // group.format.block_size
