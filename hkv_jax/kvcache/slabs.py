"""Which group owns which slab of an arena.

Owns: the map from slab to group. Must never: know blocks; a slab is handed over only after its pool gave it up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class SlabMap:
    """Owners of the slabs of one arena.

    Invariant A1: every slab has exactly one owner (a group) or none, and no group owns fewer slabs than its reserve.
    """

    def __init__(self, num_slabs: int, initial: Mapping[int, Sequence[int]], reserves: Mapping[int, int]) -> None:
        """Slabs are 0 .. ``num_slabs - 1``; ``initial`` names each group's, ``reserves`` how many it never goes below.

        Raises:
            ValueError: two groups claim one slab, or a slab does not exist.
        """
        self._owners: list[int | None] = [None] * num_slabs
        self._counts = dict.fromkeys(initial, 0)
        self._reserves = dict(reserves)
        for group, slabs in initial.items():
            for slab in slabs:
                self.give(slab, group)

    @property
    def num_slabs(self) -> int:
        """Slabs of the arena."""
        return len(self._owners)

    def slabs_of(self, group: int) -> tuple[int, ...]:
        """The slabs ``group`` owns, ascending."""
        return tuple(slab for slab, owner in enumerate(self._owners) if owner == group)

    def can_take(self, group: int) -> bool:
        """Whether ``group`` may lose a slab without going below its reserve."""
        return self._counts[group] > self._reserves[group]

    def take(self, slab: int, group: int) -> None:
        """Takes ``slab`` from ``group``; it has no owner until it is given.

        Raises:
            ValueError: ``group`` does not own it, or would go below its reserve.
        """
        if self._owners[slab] != group:
            raise ValueError(f"slab {slab} belongs to group {self._owners[slab]}, not to group {group}")
        if not self.can_take(group):
            raise ValueError(f"group {group} is at its reserve of {self._reserves[group]} slabs")
        self._owners[slab] = None
        self._counts[group] -= 1

    def give(self, slab: int, group: int) -> None:
        """Gives ``slab``, which nobody owns, to ``group``.

        Raises:
            ValueError: the slab does not exist or has an owner.
        """
        if not 0 <= slab < len(self._owners):
            raise ValueError(f"slab {slab} is not one of {len(self._owners)}")
        if self._owners[slab] is not None:
            raise ValueError(f"slab {slab} already belongs to group {self._owners[slab]}")
        self._owners[slab] = group
        self._counts[group] += 1

    def check_invariants(self) -> None:
        """Asserts A1."""
        for group, count in self._counts.items():
            assert count == len(self.slabs_of(group)), f"A1: group {group} counts {count} slabs"
            assert count >= self._reserves[group], f"A1: group {group} owns {count} slabs, below its reserve"
        owned = sum(owner is not None for owner in self._owners)
        assert owned == sum(self._counts.values()), "A1: a slab belongs to an unknown group"
