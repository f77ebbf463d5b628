"""The whole cache against two brutally simple models, rule by rule.

``Ledger`` says by the definitions which block numbers a lane holds. ``Device`` keeps tables and memory as a device
does, in its order of events, and finds every readable token where the cache said it would be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hkv_jax.kvcache.block_table import BlockTable
from hkv_jax.kvcache.format import NO_SLOT
from hkv_jax.kvcache.group_cache import GroupCache
from hkv_jax.kvcache.layout import GroupLayout, KVLayout, plan_layout
from hkv_jax.kvcache.manager import CacheManager, Fork
from hkv_jax.testing.cache_layouts import tiny_group, tiny_layout_request

NUM_LANES = 4
MAX_LEN = 72
MAX_CHUNK = 40

two_windows = (
    tiny_group(None),
    *(
        type(g)(f"sliding_w{g.window}", g.kind, g.window, g.num_kv_heads, g.head_dim, g.layers)
        for g in (tiny_group(6), tiny_group(16))
    ),
)
CASES: dict[str, dict[str, Any]] = {
    "hybrid": {"budget_bytes": 23_000},
    "static": {"budget_bytes": 23_000, "partition": "static"},
    "equal blocks": {"budget_bytes": 23_000, "block_sizes": {"global": 4, "sliding": 4}},
    "all sliding": {"budget_bytes": 11_000, "groups": (tiny_group(9),)},
    "all global": {"budget_bytes": 30_000, "groups": (tiny_group(None),)},
    "two windows": {"budget_bytes": 36_000, "groups": two_windows, "block_sizes": {"global": 8, "sliding": 4}},
    "window of one": {"budget_bytes": 12_000, "groups": (tiny_group(None), tiny_group(1))},
}  # fmt: skip


class Ledger:
    """Which block numbers each lane holds, by definition; each block has an identity, so that forks can share it."""

    def __init__(self, layout: KVLayout) -> None:
        self.groups = layout.groups
        self.tokens: dict[int, list[int]] = {}
        self.held: dict[int, list[dict[int, int]]] = {}
        self.new_identity = itertools.count()
        self.released = [0] * len(layout.groups)

    def open(self, lane: int) -> None:
        self.tokens[lane] = []
        self.held[lane] = [{} for _ in self.groups]

    def used(self, group: int) -> int:
        return len({identity for held in self.held.values() for identity in held[group].values()})

    def release(self, lane: int, start: int) -> None:
        """A block goes when its last position is out of the window of position ``start``."""
        for g, layout in enumerate(self.groups):
            size, window = layout.format.block_size, layout.spec.window
            held = self.held[lane][g]
            gone = [b for b in held if window is not None and (b + 1) * size - 1 < start - window + 1]
            self.released[g] += len(gone)
            for block in gone:
                del held[block]

    def missing(self, lane: int, group: int, end: int) -> list[int]:
        """New block numbers for tokens up to ``end`` that the next position, ``end``, can still attend to."""
        size, window = self.groups[group].format.block_size, self.groups[group].spec.window
        known = -(-len(self.tokens[lane]) // size)
        return [b for b in range(known, -(-end // size)) if window is None or (b + 1) * size - 1 >= end - window + 1]

    def add(self, lane: int, end: int) -> None:
        for g in range(len(self.groups)):
            for block in self.missing(lane, g, end):
                self.held[lane][g][block] = next(self.new_identity)

    def numbers(self, lane: int) -> list[list[int]]:
        return [sorted(held) for held in self.held[lane]]


class Device:
    """Tables and memory as a device keeps them: rows per lane, and for each byte a K row starts at, the token there."""

    def __init__(self, layout: KVLayout) -> None:
        self.groups = layout.groups
        self.rows = [np.zeros((NUM_LANES, group.table_width), np.int64) for group in layout.groups]
        self.memory: dict[tuple[int, int], int] = {}

    def fork(self, fork: Fork) -> None:
        for rows in self.rows:
            rows[fork.target] = rows[fork.source]
        for group, source, target in fork.copies:
            size = self.groups[group].format.block_size
            for offset in range(size):
                for to, by in zip(
                    self._places(group, target, offset), self._places(group, source, offset), strict=True
                ):
                    self.memory[to] = self.memory.get(by, -1)

    def step(
        self, cache: CacheManager, chunks: list[tuple[int, int, int]], tokens: dict[int, list[int]], decode: bool
    ) -> None:
        """Rows run ``[start, end)`` of their lanes; one row's reads may come before or after another's writes."""
        for g, group in enumerate(self.groups):
            updates = cache.take_table_updates(g)
            assert updates.dtype == np.int32
            assert len({(lane, column) for lane, column, _ in updates.tolist()}) == len(updates), "an entry comes twice"
            sliding = group.spec.window is not None
            if not sliding:
                self._apply(g, updates)
            for lane, start, _ in chunks:
                self._read(g, lane, range(self._oldest(group, start), start), tokens[lane])
            self._write(g, self._slots(cache, g, chunks, decode), chunks, tokens)
            for lane, start, end in chunks:
                newest = start if sliding else end
                self._read(g, lane, range(self._oldest(group, start), newest), tokens[lane])
            if sliding:
                self._apply(g, updates)

    def _slots(self, cache: CacheManager, g: int, chunks: list[tuple[int, int, int]], decode: bool) -> list[list[int]]:
        slots = [cache.write_slots(g, *chunk) for chunk in chunks]
        assert all(s.dtype == np.int32 and s.shape == (end - start,) for s, (_, start, end) in zip(slots, chunks))  # noqa: B905
        if decode:
            lanes, starts = np.array([c[0] for c in chunks], np.int32), np.array([c[1] for c in chunks], np.int32)
            single = cache.decode_slots(g, lanes, starts)
            assert single.dtype == np.int32
            # In a window of one the last place of a block is never read: one way writes it, the other does not.
            assert all(a in (b, NO_SLOT) for (a,), b in zip(slots, single.tolist(), strict=True))
        live = [slot for row in slots for slot in row.tolist() if slot != NO_SLOT]
        assert len(live) == len(set(live)), "T3: two tokens of a step share a slot"
        return [row.tolist() for row in slots]

    def _write(
        self, g: int, slots: list[list[int]], chunks: list[tuple[int, int, int]], tokens: dict[int, list[int]]
    ) -> None:
        size = self.groups[g].format.block_size
        for row, (lane, start, _) in zip(slots, chunks, strict=True):
            for position, slot in enumerate(row, start):
                if slot != NO_SLOT:
                    for place in self._places(g, slot // size, slot % size):
                        self.memory[place] = tokens[lane][position]

    def _read(self, g: int, lane: int, positions: range, tokens: list[int]) -> None:
        size, width = self.groups[g].format.block_size, self.groups[g].table_width
        for position in positions:
            page = int(self.rows[g][lane, position // size % width])
            for place in self._places(g, page, position % size):
                found = self.memory.get(place)
                assert found == tokens[position], f"lane {lane}: position {position} of group {g} holds {found}"

    def _places(self, g: int, page: int, offset: int) -> list[tuple[int, int]]:
        group = self.groups[g]
        row_bytes = group.format.row_elements * group.format.itemsize
        pages = range(page, page + group.format.num_layers)
        return [(group.arena, p * group.format.page_bytes + offset * row_bytes) for p in pages]

    def _apply(self, g: int, updates: np.ndarray) -> None:
        self.rows[g][updates[:, 0], updates[:, 1]] = updates[:, 2]

    @staticmethod
    def _oldest(group: GroupLayout, start: int) -> int:
        return 0 if group.spec.window is None else max(0, start - group.spec.window + 1)


class ManagerMachine(RuleBasedStateMachine):
    @initialize(case=st.sampled_from(sorted(CASES)))
    def begin(self, case: str) -> None:
        request = tiny_layout_request(max_model_len=MAX_LEN, max_chunk=MAX_CHUNK, **CASES[case])
        self.layout = plan_layout(request)
        self.cache = CacheManager(self.layout, NUM_LANES)
        self.ledger = Ledger(self.layout)
        self.device = Device(self.layout)
        self.new_token = itertools.count(1)

    def open_lanes(self, longest: int = MAX_LEN) -> list[int]:
        return sorted(lane for lane, tokens in self.ledger.tokens.items() if len(tokens) <= longest)

    def closed_lanes(self) -> list[int]:
        return [lane for lane in range(NUM_LANES) if lane not in self.ledger.tokens]

    def can_have(self, missing: list[int]) -> bool:
        """Whether every group has so many free blocks, or gets the slabs that others need not.

        A group gives slabs without a held block, never below its reserve, and keeps as many blocks as it needs itself.
        """
        wanted, spare = [0] * len(self.layout.arenas), [0] * len(self.layout.arenas)
        for g, (layout, pool) in enumerate(zip(self.layout.groups, self.cache.stats(), strict=True)):
            left, per_slab = pool.num_blocks - self.ledger.used(g) - missing[g], layout.blocks_per_slab
            num_idle = self.cache._groups[g].pool.num_idle_slabs
            if left < 0:
                wanted[layout.arena] += -(left // per_slab)
            elif self.layout.partition == "moving":
                above_reserve = pool.num_blocks // per_slab - layout.reserve_slabs
                spare[layout.arena] += min(num_idle, left // per_slab, above_reserve)
        return all(few <= many for few, many in zip(wanted, spare, strict=True))

    def make_room(self, lane: int, end: int) -> bool:
        """Extends cache and ledger, whose answers must agree; tokens are added when there is room."""
        start = len(self.ledger.tokens[lane])
        self.ledger.release(lane, start)
        expected = self.can_have([len(self.ledger.missing(lane, g, end)) for g in range(len(self.layout.groups))])
        assert self.cache.extend(lane, start, end) == expected
        if expected:
            self.ledger.add(lane, end)
            self.ledger.tokens[lane] += itertools.islice(self.new_token, end - start)
        if not expected:
            # As a scheduler does with the youngest: others may get its blocks in the very same plan.
            self.forget(lane)
        return expected

    def forget(self, lane: int) -> None:
        self.cache.close(lane)
        del self.ledger.tokens[lane], self.ledger.held[lane]

    def decode(self, lane: int) -> bool:
        """One token, asking the cache only past the watermark; below it the ledger must find nothing to do."""
        end = len(self.ledger.tokens[lane]) + 1
        if end > self.cache.watermarks[lane]:
            before = self.ledger.numbers(lane)
            done = self.make_room(lane, end)
            assert not done or self.ledger.numbers(lane) != before, "the watermark asked for nothing"
            return done
        before = self.ledger.numbers(lane)
        self.ledger.release(lane, end - 1)
        self.ledger.add(lane, end)
        assert self.ledger.numbers(lane) == before, "the watermark kept a change from being made"
        self.ledger.tokens[lane].append(next(self.new_token))
        return True

    @precondition(lambda self: self.closed_lanes())
    @rule(data=st.data(), length=st.integers(1, MAX_CHUNK))
    def open(self, data: st.DataObject, length: int) -> None:
        lane = data.draw(st.sampled_from(self.closed_lanes()))
        self.cache.open(lane)
        self.ledger.open(lane)
        if self.make_room(lane, length):
            self.device.step(self.cache, [(lane, 0, length)], self.ledger.tokens, decode=False)

    @precondition(lambda self: self.open_lanes(MAX_LEN - 1))
    @rule(data=st.data(), length=st.integers(1, MAX_CHUNK))
    def chunk(self, data: st.DataObject, length: int) -> None:
        lane = data.draw(st.sampled_from(self.open_lanes(MAX_LEN - 1)))
        start = len(self.ledger.tokens[lane])
        end = min(MAX_LEN, start + length)
        if self.make_room(lane, end):
            self.device.step(self.cache, [(lane, start, end)], self.ledger.tokens, decode=end - start == 1)

    @rule(steps=st.integers(1, 12))
    def decode_steps(self, steps: int) -> None:
        for _ in range(steps):
            lanes = [lane for lane in self.open_lanes(MAX_LEN - 1) if self.ledger.tokens[lane] and self.decode(lane)]
            ends = [(lane, len(self.ledger.tokens[lane])) for lane in lanes]
            self.device.step(self.cache, [(lane, end - 1, end) for lane, end in ends], self.ledger.tokens, decode=True)

    @precondition(lambda self: self.open_lanes())
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        lane = data.draw(st.sampled_from(self.open_lanes()))
        self.forget(lane)

    @precondition(lambda self: self.open_lanes(MAX_LEN - 1) and self.closed_lanes())
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(self.open_lanes(MAX_LEN - 1)))
        target = data.draw(st.sampled_from(self.closed_lanes()))
        count = len(self.ledger.tokens[source])
        partial = [g for g, group in enumerate(self.layout.groups) if count % group.format.block_size]
        expected = self.can_have([int(g in partial) for g in range(len(self.layout.groups))])
        fork = self.cache.fork(source, target, count)
        assert (fork is not None) == expected
        if fork is None:
            return
        assert [copy[0] for copy in fork.copies] == partial
        self.ledger.open(target)
        self.ledger.tokens[target] = list(self.ledger.tokens[source])
        for g, group in enumerate(self.layout.groups):
            size, window = group.format.block_size, group.spec.window
            needed = {
                b: i
                for b, i in self.ledger.held[source][g].items()
                if window is None or (b + 1) * size > count - window + 1
            }
            if g in partial:
                needed[count // size] = next(self.ledger.new_identity)
            self.ledger.held[target][g] = needed
        self.device.fork(fork)
        # As in a scheduler: both run the next token, its draw apart, in the plan that forks.
        chunks = [(lane, count, count + 1) for lane in (source, target) if self.make_room(lane, count + 1)]
        self.device.step(self.cache, chunks, self.ledger.tokens, decode=True)

    @precondition(lambda self: self.open_lanes())
    @rule(data=st.data(), back=st.integers(0, 12))
    def truncate(self, data: st.DataObject, back: int) -> None:
        lane = data.draw(st.sampled_from(self.open_lanes()))
        length = max(0, len(self.ledger.tokens[lane]) - back)
        try:
            self.cache.truncate(lane, length)
        except ValueError:
            return
        self.ledger.tokens[lane] = self.ledger.tokens[lane][:length]
        for group, held in zip(self.layout.groups, self.ledger.held[lane], strict=True):
            for block in [b for b in held if b * group.format.block_size >= length]:
                del held[block]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_invariants()
        assert self.layout.partition == "moving" or not self.cache.num_slabs_moved
        for g, pool in enumerate(self.cache.stats()):
            assert pool.used_blocks == self.ledger.used(g)
            assert pool.released_early_blocks == self.ledger.released[g]
        for lane in self.ledger.tokens:
            for g, group in enumerate(self.layout.groups):
                numbers = sorted(self.ledger.held[lane][g])
                row = self.cache.table_row(g, lane)
                assert np.count_nonzero(row) <= len(numbers) <= max(group.floor_blocks, group.table_width)


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(max_examples=100, stateful_step_count=30)


def release_and_keep(self: GroupCache, lane: int, start: int) -> bool:
    """T2 broken: released blocks stay in the table, and are released again later."""
    table = self.tables[lane]
    count = max(0, table.first_live(start) - table.first_block)
    self.pool.release([block for block in table.ids[:count] if block >= 0])
    return False


def release_twice(self: GroupCache, lane: int, start: int) -> bool:
    table = self.tables[lane]
    released = table.release_below(table.first_live(start))
    self.pool.release(released)
    self.pool.release(block for block in released if self.pool.references(block))
    self.num_released_early += len(released)
    return False


def forget_to_release(self: GroupCache, lane: int, start: int) -> bool:
    table = self.tables[lane]
    self.num_released_early += len(table.release_below(table.first_live(start)))
    return False


def one_token_early(self: BlockTable, num_tokens: int) -> int:
    return 0 if self.window is None else max(0, num_tokens - self.window + 2) // self.block_size


def never_a_release(self: BlockTable) -> int:
    return self.capacity


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (GroupCache, "release_window", release_and_keep),
        (GroupCache, "release_window", release_twice),
        (GroupCache, "release_window", forget_to_release),
        (BlockTable, "first_live", one_token_early),
        (BlockTable, "decode_end", property(never_a_release)),
    ],
    ids=[
        "double free: kept in the table",
        "double free: of a shared block",
        "leak",
        "window off by one",
        "late release",
    ],
)
def test_planted_faults_are_caught(
    owner: type, name: str, fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, fault)
    quick = settings(max_examples=100, stateful_step_count=30, report_multiple_bugs=False, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(ManagerMachine, settings=quick)
