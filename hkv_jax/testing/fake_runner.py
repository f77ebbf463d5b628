"""A runner without a device: it keeps tables, lanes and arena as a device would, and sees every misplaced token.

Owns: the device's rules in numpy: the order of table updates, writes and reads, forks, lanes. Instead of K/V a slot
holds a fingerprint of the token's whole prefix, in every layer's page. A row reads exactly what a device would read,
through the lane's tables; whatever it finds there that is not its own prefix is an ``AssertionError``, and draws are
functions of what was read. Must never: import jax, or ask the cache manager where a block is.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from hkv_jax.engine.batch import StepBatch
from hkv_jax.engine.batch_check import check
from hkv_jax.engine.batch_format import NO_TOKEN, StepFields
from hkv_jax.engine.buckets import Buckets
from hkv_jax.engine.plan import StepPlan
from hkv_jax.engine.step_result import Logprobs, StepResult
from hkv_jax.kvcache.format import NO_SLOT
from hkv_jax.kvcache.layout import GroupLayout, KVLayout
from hkv_jax.kvcache.manager import Fork
from hkv_jax.sampling_params import MAX_LOGPROBS

NO_PAGE = -1
"""A table entry that was never written."""

WORD = 2**64 - 1

Prints = NDArray[np.uint64]
"""Fingerprints, one a token."""


def fingerprint(*words: int) -> int:
    """A number below 2**64 that changes with every word and with their order."""
    value = 0x243F6A8885A308D3
    for word in words:
        value = ((value ^ (word & WORD)) * 0xD6E8FEB86659FD93 + 1) & WORD
        value ^= value >> 32
    return value


@dataclasses.dataclass(slots=True)
class _Lane:
    """State of a lane: fingerprints of all prefixes run so far, what it drew, what the penalties count."""

    stop_ids: frozenset[int] = frozenset()
    prefixes: list[int] = dataclasses.field(default_factory=list)
    last_token: int = 0
    counts: int = 0

    def run(self, position: int, token: int, is_prompt: bool) -> None:
        """The token at ``position`` goes through the model; position 0 starts afresh."""
        if position == 0:
            self.prefixes, self.counts = [], 0
        assert position == len(self.prefixes), f"token {position} of a lane that has run {len(self.prefixes)}"
        self.prefixes.append(fingerprint(self.prefixes[-1] if self.prefixes else 0, token))
        self.counts = (self.counts + fingerprint(token, is_prompt)) & WORD


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    """One row of a step: positions ``[start, end)`` of the sequence in a lane, tokens from ``first`` on."""

    number: int
    lane: int
    start: int
    end: int
    first: int


class FakeArena:
    """One arena, in units of bytes that divide every group's row, so that groups that overlap destroy each other."""

    def __init__(self, layout: KVLayout, index: int) -> None:
        """Arena ``index`` of a layout, empty."""
        rows = [_row_bytes(group) for group in layout.groups if group.arena == index]
        self.unit_bytes = math.gcd(*rows)
        self.units = np.zeros(layout.arenas[index].total_bytes // self.unit_bytes, np.uint64)

    def _index(self, group: GroupLayout, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Units [n, L, units of a row] of tokens at slots [n] of layer 0."""
        row_units = _row_bytes(group) // self.unit_bytes
        layers = np.arange(group.format.num_layers) * group.format.block_size
        return (slots[:, None] + layers)[:, :, None] * row_units + np.arange(row_units)

    def write(self, group: GroupLayout, slots: NDArray[np.int64], values: Prints) -> None:
        """Writes a token's value to its slot in every layer."""
        layers = np.arange(group.format.num_layers, dtype=np.uint64)
        self.units[self._index(group, slots)] = (values[:, None] + layers)[:, :, None]

    def read(self, group: GroupLayout, slots: NDArray[np.int64]) -> Prints:
        """The values [n, L x units of a row] at slots [n] of layer 0; all of a row agree where one token wrote them."""
        layers = np.arange(group.format.num_layers, dtype=np.uint64)
        values = self.units[self._index(group, slots)] - layers[:, None]
        return values.reshape(len(slots), values.shape[1] * values.shape[2])

    def copy_block(self, group: GroupLayout, source: int, target: int) -> None:
        """Copies the pages of all layers of a block; arguments are pages of layer 0."""
        size = group.format.block_size
        offsets = np.arange(size)
        self.units[self._index(group, target * size + offsets)] = self.units[
            self._index(group, source * size + offsets)
        ]


class FakeHandle:
    """A step that has run; its result may be read once the next one is dispatched."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def read(self) -> StepResult:
        """The result."""
        return self._result


class FakeRunner:
    """Takes the place of the device's runner in tests of everything above it.

    Tokens are drawn from a fingerprint of all that a device's draw depends on: the K/V read in every group, the seed,
    sample, output position, sampling parameters and penalty counts. A request's tokens are therefore what they are
    alone, whatever it is batched with, if and only if the host side made no mistake.
    """

    def __init__(self, layout: KVLayout, buckets: Buckets, num_lanes: int, vocab_size: int) -> None:
        """A device for a cache of ``layout`` and ``num_lanes`` lanes."""
        self.buckets = buckets
        self._layout, self._num_lanes, self._vocab_size = layout, num_lanes, vocab_size
        self.reset()

    def reset(self) -> None:
        """Starts over with empty lanes, tables and arenas."""
        self._lanes = [_Lane() for _ in range(self._num_lanes)]
        self._arenas = [FakeArena(self._layout, index) for index in range(len(self._layout.arenas))]
        self._tables = [
            np.full((self._num_lanes, group.table_width), NO_PAGE, np.int64) for group in self._layout.groups
        ]

    def dispatch(self, plan: StepPlan, batch: StepBatch) -> FakeHandle:
        """Runs a step.

        Raises:
            AssertionError: the batch breaks a rule of the border, or a row would read what is not its own.
        """
        assert batch.format in self.buckets.all, f"no program for {batch.format.bucket}"
        check(batch, self._layout, self._num_lanes)
        for sequence in plan.admitted:
            self._lanes[sequence.lane] = _Lane(stop_ids=sequence.stop_ids)
        targets = {fork.target for fork in plan.forks}
        assert not targets & {fork.source for fork in plan.forks}, "a fork of a fork of the same step"
        for fork in plan.forks:
            self._fork(fork)
        return FakeHandle(self._run(batch))

    def _fork(self, fork: Fork) -> None:
        source = self._lanes[fork.source]
        self._lanes[fork.target] = dataclasses.replace(source, prefixes=list(source.prefixes))
        for table in self._tables:
            table[fork.target] = table[fork.source]
        for number, source_page, target_page in fork.copies:
            group = self._layout.groups[number]
            self._arenas[group.arena].copy_block(group, source_page, target_page)

    def _run(self, batch: StepBatch) -> StepResult:
        fields = batch.fields
        rows = _rows(fields)
        # A sliding table is a ring: the block that a new one replaces is still read by this step.
        self._update_tables(fields, windowed=False)
        for row in rows:
            self._run_tokens(fields, row)
        groups = list(zip(self._layout.groups, self._tables, fields.slots, strict=True))
        for group, _, slots in groups:
            self._write(group, slots, rows)
        contexts = [fingerprint(*(self._attend(group, table, row) for group, table, _ in groups)) for row in rows]
        self._update_tables(fields, windowed=True)
        return self._draw(batch, rows, contexts)

    def _update_tables(self, fields: StepFields, windowed: bool) -> None:
        for table, group, updates in zip(self._tables, self._layout.groups, fields.table_updates, strict=True):
            if (group.spec.window is not None) == windowed:
                live = updates[updates[:, 0] < self._num_lanes]
                table[live[:, 0], live[:, 1]] = live[:, 2]

    def _run_tokens(self, fields: StepFields, row: _Row) -> None:
        lane = self._lanes[row.lane]
        prompt_len = int(fields.prompt_lens[row.number])
        for position in range(row.start, row.end):
            token = int(fields.tokens[row.first + position - row.start])
            lane.run(position, lane.last_token if token == NO_TOKEN else token, position < prompt_len)

    def _write(self, group: GroupLayout, slots: NDArray[np.int32], rows: list[_Row]) -> None:
        values = [value for row in rows for value in self._lanes[row.lane].prefixes[row.start : row.end]]
        live = slots[: len(values)].astype(np.int64)
        kept = live != NO_SLOT
        self._arenas[group.arena].write(group, live[kept], np.array(values, np.uint64)[kept])

    def _attend(self, group: GroupLayout, table: NDArray[np.int64], row: _Row) -> int:
        """What the last query of a row sees: an exclusive or over the K/V of all tokens in its window.

        Global groups read everything through the table, the chunk included. Sliding groups read what precedes the
        chunk, from the window of its first query on; the chunk itself never needs the pool.
        """
        window = group.spec.window
        first = 0 if window is None else max(0, row.start - window + 1)
        stop = row.end if window is None else row.start
        positions = np.arange(first, stop)
        size, width = group.format.block_size, table.shape[1]
        pages = table[row.lane, positions // size % width]
        name = f"lane {row.lane}, group {group.spec.name}, tokens [{row.start}, {row.end})"
        assert np.all(pages != NO_PAGE), f"{name}: a table entry was never set"
        found = self._arenas[group.arena].read(group, pages * size + positions % size)
        prefixes = np.array(self._lanes[row.lane].prefixes, np.uint64)
        wrong = np.flatnonzero(np.any(found != prefixes[first:stop, None], axis=1))
        assert not len(wrong), f"{name}: position {positions[wrong[0]]} holds the K/V of something else"
        seen = np.concatenate((found[:, 0], prefixes[stop : row.end]))
        in_window = seen if window is None else seen[-window:]
        return int(np.bitwise_xor.reduce(in_window))

    def _draw(self, batch: StepBatch, rows: list[_Row], contexts: list[int]) -> StepResult:
        fields, bucket = batch.fields, batch.format.bucket
        tokens = np.zeros(bucket.num_rows, np.int32)
        logprobs, prompt_logprobs = _no_logprobs(bucket.num_rows), _no_logprobs(bucket.num_tokens)
        for index, row in enumerate(rows):
            if fields.sample_tokens[index] != NO_TOKEN:
                lane = self._lanes[row.lane]
                lane.last_token = self._token(fields, index, lane, contexts[index])
                tokens[index] = lane.last_token
                self._fill_logprobs(logprobs, index, contexts[index], lane.last_token)
            if bucket.prefill and fields.num_prompt_logprobs[index]:
                for place, prefix in enumerate(self._lanes[row.lane].prefixes[row.start : row.end], row.first):
                    self._fill_logprobs(prompt_logprobs, place, prefix, int(fields.targets[place]))
        return StepResult(
            tokens,
            logprobs if batch.wants_logprobs else None,
            prompt_logprobs if batch.wants_prompt_logprobs else None,
        )

    def _token(self, fields: StepFields, index: int, lane: _Lane, context: int) -> int:
        """What a row draws; stop ids are passed over while they are suppressed."""
        ints = (fields.samples, fields.output_positions, fields.top_k, fields.seeds[:, 0], fields.seeds[:, 1])
        floats = (*fields[-6:],)
        words = [int(field[index]) for field in ints]
        words += [int(field[index : index + 1].view(np.int32)[0]) for field in floats]
        token = fingerprint(context, lane.counts, *words) % self._vocab_size
        while fields.suppress_stops[index] and token in lane.stop_ids:
            token = (token + 1) % self._vocab_size
        return token

    def _fill_logprobs(self, logprobs: Logprobs, place: int, context: int, token: int) -> None:
        logprobs.chosen[place] = -(fingerprint(context, token) % 1000) / 100
        logprobs.top_ids[place] = (token + np.arange(MAX_LOGPROBS)) % self._vocab_size
        logprobs.top_logprobs[place] = -np.arange(MAX_LOGPROBS) - (context % 1000) / 1000


def _row_bytes(group: GroupLayout) -> int:
    return group.format.page_bytes // group.format.block_size


def _rows(fields: StepFields) -> list[_Row]:
    starts = fields.query_starts.tolist()
    rows = []
    for index in range(int(fields.num_rows[0])):
        position, length = int(fields.start_positions[index]), starts[index + 1] - starts[index]
        rows.append(_Row(index, int(fields.lanes[index]), position, position + length, starts[index]))
    return rows


def _no_logprobs(count: int) -> Logprobs:
    shape = (count, MAX_LOGPROBS)
    return Logprobs(np.zeros(count, np.float32), np.zeros(shape, np.int32), np.zeros(shape, np.float32))
