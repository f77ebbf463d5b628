"""A runner without a device: it keeps tables, lanes and arena as a device would, and sees every misplaced token.

Owns: the device's rules in numpy: the order of copies, table rows, forks, table updates, writes and reads. Instead of
K/V a slot holds a fingerprint of the token's whole prefix, in every layer's page, and whether it is exact: K/V computed
by a run that began in the middle of a sequence without sliding context is *polluted* for as many tokens as the sliding
layers below carry the error. A row reads exactly what a device would read, through the lane's tables; whatever it finds
there that is not its own prefix, or polluted by another run than its own, is an ``AssertionError``, and draws are
functions of what was read. Must never: import jax, or ask the cache manager where a block is.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from numpy.typing import NDArray

from hkv_jax.engine.batch import StepBatch
from hkv_jax.engine.batch_check import check
from hkv_jax.engine.batch_format import NO_TOKEN, StepFields
from hkv_jax.engine.buckets import Buckets
from hkv_jax.engine.plan import BlockCopy, StepPlan
from hkv_jax.engine.request import Sequence
from hkv_jax.engine.step_result import Logprobs, StepResult
from hkv_jax.kvcache.format import NO_SLOT
from hkv_jax.kvcache.layout import KVLayout
from hkv_jax.kvcache.manager import Fork
from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.outputs import PrefixHit
from hkv_jax.sampling_params import MAX_LOGPROBS
from hkv_jax.testing.fake_arena import GroupPlaces, Ints, Prints, carried_errors, empty_arenas, group_places, mixed

NO_PAGE = -1
"""A table entry that was never written."""

NO_PREFIX = PrefixUse(0, 0, PrefixHit.MISS, 0)

DRAW_WORDS = mixed(np.arange(1, 12, dtype=np.uint64)) | np.uint64(1)
"""Odd factors, one for each number beside the tokens that a draw is a function of."""


class FakeLanes:
    """What the device knows of each of Z lanes; ``max_len`` tokens are the most a lane runs.

    prints u64[Z, max_len + 1]: at n the fingerprint of the first n tokens. lengths i64[Z]: tokens run or spared.
    counts u64[Z]: what the penalties count. last_tokens i64[Z]. contexts i64[Z]: where the sliding context begins.
    matched i64[Z]: below it the global K/V was there before. marks u64[Z]: what marks the lane's polluted K/V.
    """

    def __init__(self, num_lanes: int, max_len: int) -> None:
        self.prints = np.zeros((num_lanes, max_len + 1), np.uint64)
        self.lengths = np.zeros(num_lanes, np.int64)
        self.counts = np.zeros(num_lanes, np.uint64)
        self.last_tokens = np.zeros(num_lanes, np.int64)
        self.contexts = np.zeros(num_lanes, np.int64)
        self.matched = np.zeros(num_lanes, np.int64)
        self.marks = np.zeros(num_lanes, np.uint64)
        self.stop_ids: list[frozenset[int]] = [frozenset()] * num_lanes
        self._numbers = itertools.count(1)

    def open(self, sequence: Sequence) -> None:
        """A sequence is admitted; the tokens of a prefix that is not run are known from the beginning."""
        lane, use = sequence.lane, sequence.prefix or NO_PREFIX
        self.lengths[lane], self.contexts[lane], self.matched[lane] = use.start, use.context_start, use.matched
        self.marks[lane] = mixed(np.array([next(self._numbers)], np.uint64))[0]
        self.stop_ids[lane] = sequence.stop_ids
        self.counts[lane] = self.prints[lane, 0] = 0
        if use.start:
            tokens, positions = sequence.tokens(0, use.start).astype(np.int64), np.arange(use.start)
            self.prints[lane, 1 : use.start + 1] = prefix_prints(tokens)
            counts = _token_counts(tokens, positions < sequence.request.prompt_len)
            self.counts[lane] = np.add.reduce(counts)

    def fork(self, source: int, target: int) -> None:
        """``target`` takes over everything."""
        for array in (
            self.prints,
            self.lengths,
            self.counts,
            self.last_tokens,
            self.contexts,
            self.matched,
            self.marks,
        ):
            array[target] = array[source]
        self.stop_ids[target] = self.stop_ids[source]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The n live rows of a step and their T live tokens.

    lanes, starts (position of the first query), ends, firsts (index of the first token) i64[n]; rows i64[T]: row of
    each token; positions i64[T]. ``polluted``: whether any row runs without all of its sliding context.
    """

    lanes: Ints
    starts: Ints
    ends: Ints
    firsts: Ints
    rows: Ints
    positions: Ints
    polluted: bool


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
        self._formats = set(buckets.all)
        self._places = group_places(layout)
        self._output_reach = carried_errors(layout)[1]
        self.reset()

    def reset(self) -> None:
        """Starts over with empty lanes, tables and arenas."""
        self._lanes = FakeLanes(self._num_lanes, self._layout.max_model_len)
        self._arenas = empty_arenas(self._layout)
        self._tables = [
            np.full((self._num_lanes, group.table_width), NO_PAGE, np.int64) for group in self._layout.groups
        ]

    def check_block(self, group: int, page: int, prints: Prints) -> None:
        """Asserts that a block holds the exact K/V of tokens whose prefixes have these fingerprints, u64[P]."""
        places = self._places[group]
        found = self._arenas[places.group.arena][places.indices(places.block_slots(page))]
        wrong = np.flatnonzero(np.any(found != prints[:, None] + places.layers, axis=1))
        assert not len(wrong), (
            f"{places.group.spec.name}: token {wrong[0]} of page {page} is not what a hit would expect"
        )

    def dispatch(self, plan: StepPlan, batch: StepBatch) -> FakeHandle:
        """Runs a step.

        Raises:
            AssertionError: the batch breaks a rule of the border, or a row would read what is not its own.
        """
        assert batch.format in self._formats, f"no program for {batch.format.bucket}"
        check(batch, self._layout, self._num_lanes)
        for copy in plan.copies:
            self._copy(copy)
        for installed in plan.table_rows:
            for table, row in zip(self._tables, installed.rows, strict=True):
                table[installed.lane] = row
        for sequence in plan.admitted:
            self._lanes.open(sequence)
        targets = {fork.target for fork in plan.forks}
        assert not targets & {fork.source for fork in plan.forks}, "a fork of a fork of the same step"
        for fork in plan.forks:
            self._fork(fork)
        return FakeHandle(self._run(batch))

    def _copy(self, copy: BlockCopy) -> None:
        places = self._places[copy.group]
        units = self._arenas[places.group.arena]
        source, target = (places.indices(places.block_slots(page)) for page in (copy.source_page, copy.target_page))
        units[target] = units[source]

    def _fork(self, fork: Fork) -> None:
        self._lanes.fork(fork.source, fork.target)
        for table in self._tables:
            table[fork.target] = table[fork.source]
        for number, source_page, target_page in fork.copies:
            self._copy(BlockCopy(number, source_page, target_page))
            row = self._tables[number][fork.target]
            row[row == source_page] = target_page

    def _run(self, batch: StepBatch) -> StepResult:
        fields = batch.fields
        # A sliding table is a ring: the block that a new one replaces is still read by this step.
        self._update_tables(fields, windowed=False)
        rows = self._live_rows(fields)
        self._run_tokens(fields, rows)
        groups = list(zip(self._places, self._tables, fields.slots, strict=True))
        for places, _, slots in groups:
            self._write(places, slots, rows)
        for places, table, _ in groups:
            self._read(places, table, rows)
        self._update_tables(fields, windowed=True)
        return self._draw(batch, rows)

    def _update_tables(self, fields: StepFields, windowed: bool) -> None:
        for table, places, updates in zip(self._tables, self._places, fields.table_updates, strict=True):
            if (places.window is not None) == windowed:
                live = updates[updates[:, 0] < self._num_lanes]
                table[live[:, 0], live[:, 1]] = live[:, 2]

    def _live_rows(self, fields: StepFields) -> _Rows:
        count, num_tokens = int(fields.num_rows[0]), int(fields.query_starts[-1])
        lanes = fields.lanes[:count].astype(np.int64)
        starts = fields.start_positions[:count].astype(np.int64)
        firsts = fields.query_starts[:count].astype(np.int64)
        lengths = np.diff(fields.query_starts[: count + 1])
        known = self._lanes
        late = np.flatnonzero(known.lengths[lanes] != starts)
        if len(late):
            lane = lanes[late[0]]
            raise AssertionError(f"token {starts[late[0]]} of lane {lane}, which has run {known.lengths[lane]}")
        contexts = known.contexts[lanes]
        assert np.array_equal(fields.context_starts[:count], contexts), (
            "a context start that its sequence does not have"
        )
        return _Rows(
            lanes,
            starts,
            starts + lengths,
            firsts,
            np.repeat(np.arange(count), lengths),
            fields.positions[:num_tokens].astype(np.int64),
            bool(contexts.any()),
        )

    def _run_tokens(self, fields: StepFields, rows: _Rows) -> None:
        """The tokens go through the model: prefixes and counts of their lanes grow."""
        known, lanes = self._lanes, rows.lanes[rows.rows]
        tokens = fields.tokens[: len(rows.positions)].astype(np.int64)
        tokens = np.where(tokens == NO_TOKEN, known.last_tokens[lanes], tokens)
        prints = _token_prints(tokens, rows.positions)
        sums = np.cumsum(prints)
        base = known.prints[rows.lanes, rows.starts] - (sums - prints)[rows.firsts]
        known.prints[lanes, rows.positions + 1] = sums + base[rows.rows]
        known.lengths[rows.lanes] = rows.ends
        of_prompt = rows.positions < fields.prompt_lens[rows.rows]
        known.counts[rows.lanes] += np.add.reduceat(_token_counts(tokens, of_prompt), rows.firsts)

    def _kv(self, places: GroupPlaces, rows: _Rows, lanes: Ints, positions: Ints) -> Prints:
        """The K/V u64[n, U] of tokens of lanes, as their own run computes it."""
        known = self._lanes
        values = known.prints[lanes, positions + 1][:, None] + places.layers
        if rows.polluted:
            contexts = known.contexts[lanes][:, None]
            polluted = (contexts > 0) & (positions[:, None] < contexts + places.reach)
            # What was cached before the run is exact.
            polluted &= positions[:, None] >= (contexts if places.window else known.matched[lanes][:, None])
            values = np.where(polluted, values ^ known.marks[lanes][:, None], values)
        return values

    def _write(self, places: GroupPlaces, slots: NDArray[np.int32], rows: _Rows) -> None:
        live = slots[: len(rows.positions)].astype(np.int64)
        kept = live != NO_SLOT
        lanes, positions = rows.lanes[rows.rows][kept], rows.positions[kept]
        values = self._kv(places, rows, lanes, positions)
        if places.window is None:
            late = positions >= self._lanes.matched[lanes]
            assert np.all(late), f"{places.group.spec.name}: position {positions[~late][0]} is cached and is written"
            exact = self._lanes.prints[lanes, positions + 1][:, None] + places.layers
            assert np.array_equal(values, exact), f"{places.group.spec.name}: K/V of a polluted token is written"
        self._arenas[places.group.arena][places.indices(live[kept])] = values

    def _read(self, places: GroupPlaces, table: Ints, rows: _Rows) -> None:
        """Asserts that each row finds its own K/V at every position that the device reads through the table.

        Global groups read everything, the chunk included. Sliding groups read what precedes the chunk, from the window
        of its first query on and not below the row's context; the chunk itself never needs the pool.
        """
        window, size = places.window, places.block_size
        first, stop = np.zeros_like(rows.starts), rows.ends
        if window is not None:
            first, stop = np.maximum(rows.starts - window + 1, self._lanes.contexts[rows.lanes]), rows.starts
        counts = stop - first
        row = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(row)) - (np.cumsum(counts) - counts - first)[row]
        lanes = rows.lanes[row]
        pages = table[lanes, positions // size % table.shape[1]]
        found = self._arenas[places.group.arena][places.indices(pages * size + positions % size)]
        expected = self._kv(places, rows, lanes, positions)
        if pages.min(initial=0) < 0 or not np.array_equal(found, expected):
            bad = (pages == NO_PAGE) | np.any(found != expected, axis=1)
            worst = int(np.flatnonzero(bad)[0])
            at = row[worst]
            where = f"lane {lanes[worst]}, group {places.group.spec.name}, tokens [{rows.starts[at]}, {rows.ends[at]})"
            assert pages[worst] != NO_PAGE, f"{where}: a table entry was never set"
            raise AssertionError(f"{where}: position {positions[worst]} holds the K/V of something else")

    def _draw(self, batch: StepBatch, rows: _Rows) -> StepResult:
        fields, count = batch.fields, len(rows.lanes)
        drawn = fields.sample_tokens[:count] != NO_TOKEN
        exact = ~(rows.polluted & self._is_polluted(rows.lanes, rows.ends - 1))
        assert np.all(exact[drawn]), "a token is drawn from a polluted context"
        tokens = np.zeros(batch.format.bucket.num_rows, np.int32)
        contexts = mixed(self._lanes.prints[rows.lanes, rows.ends])
        tokens[:count] = np.where(drawn, self._tokens(batch, rows, contexts), 0)
        for index in np.flatnonzero(drawn & (fields.suppress_stops[:count] > 0)).tolist():
            stop_ids = self._lanes.stop_ids[rows.lanes[index]]
            while int(tokens[index]) in stop_ids:
                tokens[index] = (tokens[index] + 1) % self._vocab_size
        self._lanes.last_tokens[rows.lanes[drawn]] = tokens[:count][drawn]
        logprobs = None
        if batch.wants_logprobs:
            logprobs = _no_logprobs(batch.format.bucket.num_rows)
            for index in np.flatnonzero(drawn).tolist():
                self._fill_logprobs(logprobs, index, int(contexts[index]), int(tokens[index]))
        return StepResult(
            tokens, logprobs, self._prompt_logprobs(fields, rows) if batch.wants_prompt_logprobs else None
        )

    def _tokens(self, batch: StepBatch, rows: _Rows, contexts: Prints) -> Ints:
        """What each row would draw, were nothing suppressed."""
        fields, count = batch.fields, len(rows.lanes)
        ints = (fields.samples, fields.output_positions, fields.top_k, fields.seeds[:, 0], fields.seeds[:, 1])
        floats = batch.floats.view(np.int32).reshape(6, -1)[:, :count]
        words = np.concatenate((np.stack([column[:count] for column in ints]), floats)).astype(np.int64)
        sums = np.add.reduce(words.view(np.uint64) * DRAW_WORDS[:, None], axis=0)
        draws = mixed(sums + mixed(contexts + self._lanes.counts[rows.lanes]))
        return (draws % np.uint64(self._vocab_size)).astype(np.int64)

    def _is_polluted(self, lanes: Ints, positions: Ints) -> NDArray[np.bool_]:
        """Whether the output of tokens of lanes lacks something."""
        contexts = self._lanes.contexts[lanes]
        polluted: NDArray[np.bool_] = (contexts > 0) & (positions < contexts + self._output_reach)
        return polluted

    def _prompt_logprobs(self, fields: StepFields, rows: _Rows) -> Logprobs:
        """Those of all tokens of the rows that want any; a polluted token's are not what they are alone."""
        logprobs = _no_logprobs(len(fields.tokens))
        for index in np.flatnonzero(fields.num_prompt_logprobs[: len(rows.lanes)]).tolist():
            lane = int(rows.lanes[index])
            positions = np.arange(rows.starts[index], rows.ends[index])
            prints = self._lanes.prints[lane, positions + 1]
            polluted = self._is_polluted(np.full(len(positions), lane), positions)
            values = mixed(np.where(polluted, prints ^ self._lanes.marks[lane], prints))
            for place, value in enumerate(values.tolist(), int(rows.firsts[index])):
                self._fill_logprobs(logprobs, place, value, int(fields.targets[place]))
        return logprobs

    def _fill_logprobs(self, logprobs: Logprobs, place: int, context: int, token: int) -> None:
        logprobs.chosen[place] = -((context + 7 * token) % 1000) / 100
        logprobs.top_ids[place] = (token + np.arange(MAX_LOGPROBS)) % self._vocab_size
        logprobs.top_logprobs[place] = -np.arange(MAX_LOGPROBS) - (context % 1000) / 1000


def prefix_prints(tokens: Ints) -> Prints:
    """The fingerprint of each token's prefix, itself included."""
    return np.cumsum(_token_prints(tokens, np.arange(len(tokens))))


def _token_prints(tokens: Ints, positions: Ints) -> Prints:
    return mixed(((tokens << 32) + positions + 1).view(np.uint64))


def _token_counts(tokens: Ints, of_prompt: NDArray[np.bool_]) -> Prints:
    return mixed((2 * tokens + of_prompt + 1).view(np.uint64))


def _no_logprobs(count: int) -> Logprobs:
    shape = (count, MAX_LOGPROBS)
    return Logprobs(np.zeros(count, np.float32), np.zeros(shape, np.int32), np.zeros(shape, np.float32))
