"""Room for a group, wherever the cheapest memory lies.

Owns: which slabs change hands and when cached blocks are evicted. Must never: take a block that a table holds, or take
a group below its reserve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hkv_jax.kvcache.group_cache import GroupCache
from hkv_jax.kvcache.layout import KVLayout
from hkv_jax.kvcache.slabs import SlabMap

MAX_GATHERED_SLABS = 4
"""Slabs emptied for one group before a step: copying is paid for by everybody."""


class Boundary:
    """The slabs of every arena and who owns them. ``evict()`` gives up the least worthy cached blocks of all groups."""

    def __init__(self, layout: KVLayout, groups: list[GroupCache], evict: Callable[[], bool]) -> None:
        self.num_slabs_moved = 0
        # Since the last gathering: groups that had to evict, those that got nothing for it, and what was needed of all
        # groups when that was so.
        self._evicted_for: set[int] = set()
        self._missed: set[int] = set()
        self._wanted = [0] * len(groups)
        self._layout, self._groups, self._evict = layout, groups, evict
        self._arenas = [group.arena for group in layout.groups]
        self._maps = [_slab_map(layout, arena) for arena in range(len(layout.arenas))]

    def make_room(self, needs: Sequence[int]) -> bool:
        """Has ``needs[group]`` blocks free in every group; False, perhaps after evictions, where that cannot be."""
        for group, count in enumerate(needs):
            pool = self._groups[group].pool
            while pool.num_free < count:
                if self._take_idle_slab(group, needs):
                    continue
                self._evicted_for.add(group)
                if not self._evict():
                    self._missed.add(group)
                    self._wanted = [max(wanted, need) for wanted, need in zip(self._wanted, needs, strict=True)]
                    return False
        return True

    def gather(self) -> list[tuple[int, int, int]]:
        """Empties slabs of groups with room to spare for those that lacked memory since the last call.

        Returns (group, old id, new id) of every block that moved; the pools have renamed them, nobody else has.
        """
        evicted_for, self._evicted_for = self._evicted_for, set()
        missed, self._missed = self._missed, set()
        wanted, self._wanted = self._wanted, [0] * len(self._groups)
        if self._layout.partition != "moving":
            return []
        moves = []
        lacking = {group for group in evicted_for if group in missed or not self._has_spare(group)}
        for group in sorted(lacking):
            # Who only had to evict gets a slab or two for the next time; who got nothing gets what it needed.
            for _ in range(MAX_GATHERED_SLABS if group not in missed else self._maps[self._arenas[group]].num_slabs):
                pool = self._groups[group].pool
                if pool.num_free >= wanted[group] if group in missed else pool.num_idle_slabs:
                    break
                others = [other for other in range(len(self._groups)) if other not in lacking]
                giver = self._fragmented(group, others, wanted if group in missed else None)
                if giver is None:
                    break
                emptiest = self._groups[giver].pool.emptiest_slab()
                assert emptiest is not None
                moves += [(giver, *move) for move in self._groups[giver].pool.vacate(emptiest[0])]
                self._hand_over(emptiest[0], giver, group)
        return moves

    def _fragmented(self, group: int, others: list[int], wanted: Sequence[int] | None) -> int | None:
        """One of ``others`` whose free blocks would fill a slab, and more where nobody waits for it.

        Where somebody does, he needs ``wanted`` blocks of each group: one that gave these away would be short next.
        """
        arena = self._arenas[group]
        for other in others:
            if self._arenas[other] != arena or not self._maps[arena].can_take(other):
                continue
            pool = self._groups[other].pool
            if self._has_spare(other) if wanted is None else pool.num_free - wanted[other] >= pool.blocks_per_slab:
                return other
        return None

    def _has_spare(self, group: int) -> bool:
        """Whether a group has free blocks for a slab and more: it may have evicted and does not lack memory now."""
        pool = self._groups[group].pool
        return pool.num_free >= pool.blocks_per_slab + pool.blocks_per_slab // 2 + 1

    def _hand_over(self, slab: int, giver: int, taker: int) -> None:
        slabs = self._maps[self._arenas[giver]]
        slabs.take(slab, giver)
        slabs.give(slab, taker)
        self._groups[taker].pool.add_slab(slab)
        self.num_slabs_moved += 1

    def _take_idle_slab(self, group: int, needs: Sequence[int]) -> bool:
        """Moves a slab without a busy block to ``group`` from whoever has most of them and more than it needs."""
        if self._layout.partition != "moving":
            return False
        arena = self._arenas[group]
        slabs = self._maps[arena]
        givers = []
        for other, cache in enumerate(self._groups):
            pool = cache.pool
            shares = self._arenas[other] == arena and other != group and slabs.can_take(other)
            if shares and pool.num_idle_slabs and pool.num_free - pool.blocks_per_slab >= needs[other]:
                givers.append(other)
        if not givers:
            return False
        giver = max(givers, key=lambda other: self._groups[other].pool.num_idle_slabs)
        slab = self._groups[giver].pool.take_slab()
        assert slab is not None
        self._hand_over(slab, giver, group)
        return True

    def could_hold(self, extra: Sequence[int]) -> bool:
        """Whether ``extra[group]`` more held blocks would fit if everything cached were evicted.

        Held blocks can be gathered, so that only the slabs they fill are their group's.
        """
        needed = [0] * len(self._maps)
        for group, cache in enumerate(self._groups):
            pool = cache.pool
            wanted = -(-(pool.num_held + extra[group]) // pool.blocks_per_slab)
            if self._layout.partition != "moving":
                if wanted > len(pool.slabs):
                    return False
                continue
            needed[self._arenas[group]] += max(cache.layout.reserve_slabs, wanted)
        return all(count <= slabs.num_slabs for count, slabs in zip(needed, self._maps, strict=True))

    def check_invariants(self) -> None:
        """Asserts A1, and that pools and maps agree."""
        for slabs in self._maps:
            slabs.check_invariants()
        for index, group in enumerate(self._groups):
            slabs = self._maps[self._arenas[index]]
            assert slabs.slabs_of(index) == group.pool.slabs, "A1: the pool's slabs are not those of the map"


def _slab_map(layout: KVLayout, arena: int) -> SlabMap:
    groups = {index: group for index, group in enumerate(layout.groups) if group.arena == arena}
    return SlabMap(
        layout.arenas[arena].num_slabs,
        {index: group.initial_slabs for index, group in groups.items()},
        {index: group.reserve_slabs for index, group in groups.items()},
    )
