"""Runs batches on the device, one step ahead of the host.

Owns: the device state between steps and the programs. Donation makes steps run in the order of dispatch; a step is
dispatched before the tokens of the one before are read. Must never: schedule, or read a token before it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import numpy as np

from hkv_jax.engine.batch import StepBatch
from hkv_jax.engine.buckets import Buckets
from hkv_jax.engine.device_state import (
    COPIES_A_CALL,
    FORKS_A_CALL,
    MAX_MASKED_STOPS,
    PREFIX_TOKENS_A_CALL,
    TABLE_ROWS_A_CALL,
    DeviceState,
    LaneSetup,
    PrefixTokens,
    TableRows,
    allocate_state,
    no_copies,
    no_forks,
)
from hkv_jax.engine.plan import BlockCopy, LaneTables, StepPlan
from hkv_jax.engine.programs import Programs
from hkv_jax.engine.request import Sequence
from hkv_jax.engine.step import StepOutputs
from hkv_jax.engine.step_result import Logprobs, StepResult
from hkv_jax.kvcache.manager import Fork
from hkv_jax.model.logprobs import TopLogprobs
from hkv_jax.model.transformer import ModelParameters
from hkv_jax.sampling_params import MAX_LOGIT_BIASES


class StepHandle:
    """A dispatched step; the device may still be running it."""

    def __init__(self, outputs: StepOutputs, batch: StepBatch) -> None:
        self._outputs, self._batch = outputs, batch

    def read(self) -> StepResult:
        """Waits for the step and brings back its tokens, and logprobs where a row asked for them."""
        outputs, batch = self._outputs, self._batch
        return StepResult(
            np.asarray(outputs.tokens),
            _logprobs(outputs.logprobs) if batch.wants_logprobs else None,
            _logprobs(outputs.prompt_logprobs) if batch.wants_prompt_logprobs else None,
        )


class Runner:
    """The device side of an engine.

    Args:
        programs: everything that will ever run.
        parameters: the model's, in the form the programs were compiled for.
        shapes: shapes of the device state; it is allocated here.
        buckets: the formats of the batches it takes.
        vocab_size: ids at or above it are no tokens.
    """

    def __init__(
        self, programs: Programs, parameters: ModelParameters, shapes: DeviceState, buckets: Buckets, vocab_size: int
    ) -> None:
        self.buckets = buckets
        self._programs, self._parameters, self._shapes = programs, parameters, shapes
        self._vocab_size = vocab_size
        self._num_lanes = shapes.last_tokens.shape[0]
        self._state = allocate_state(shapes, vocab_size)
        self._set_up_lanes: set[int] = set()

    def dispatch(self, plan: StepPlan, batch: StepBatch) -> StepHandle:
        """Starts the step of ``plan`` and returns before the device is done."""
        if plan.copies:
            self._copy(plan.copies)
        if plan.table_rows:
            self._install(plan.table_rows)
        for sequence in plan.admitted:
            self._set_up(sequence)
            self._count_prefix(sequence)
        if plan.forks:
            self._fork(plan.forks)
        program = self._programs.steps[batch.format.bucket]
        self._state, outputs = program(self._parameters, self._state, batch.ints, batch.floats)
        return StepHandle(outputs, batch)

    def reset(self) -> None:
        """Starts over with empty lanes and an empty arena; a failed step has lost every donated array."""
        # What a failed step left behind goes first: the device need not have room for two arenas.
        for array in jax.tree.leaves(self._state):
            if not array.is_deleted():
                array.delete()
        self._state = allocate_state(self._shapes, self._vocab_size)
        self._set_up_lanes.clear()

    def _copy(self, copies: tuple[BlockCopy, ...]) -> None:
        """Copies blocks in the order of the plan: groups share an arena, so a target may be where a source was."""
        num_groups = len(self._shapes.tables)
        entries, place, group = no_copies(num_groups), 0, 0
        for copy in copies:
            # A call goes through the groups in order.
            if place == COPIES_A_CALL or copy.group < group:
                self._state = self._programs.block_copies(self._state, entries)
                entries, place = no_copies(num_groups), 0
            group = copy.group
            entries.source_pages[group, place], entries.target_pages[group, place] = copy.source_page, copy.target_page
            place += 1
        self._state = self._programs.block_copies(self._state, entries)

    def _install(self, tables: tuple[LaneTables, ...]) -> None:
        for begin in range(0, len(tables), TABLE_ROWS_A_CALL):
            lanes = np.full(TABLE_ROWS_A_CALL, self._num_lanes, np.int32)
            rows = tuple(np.zeros((TABLE_ROWS_A_CALL, shape.shape[1]), np.int32) for shape in self._shapes.tables)
            for place, table in enumerate(tables[begin : begin + TABLE_ROWS_A_CALL]):
                lanes[place] = table.lane
                for target, row in zip(rows, table.rows, strict=True):
                    target[place] = row
            self._state = self._programs.table_rows(self._state, TableRows(lanes, rows))

    def _count_prefix(self, sequence: Sequence) -> None:
        """Tells the penalties of the tokens that a cached prefix spares the lane."""
        start = 0 if sequence.prefix is None else sequence.prefix.start
        if not (start and sequence.request.params.has_penalties):
            return
        tokens, prompt_len = sequence.tokens(0, start), sequence.request.prompt_len
        # Of the prompt it only matters which ids occur.
        prompt, outputs = np.unique(tokens[:prompt_len]), tokens[prompt_len:]
        size = PREFIX_TOKENS_A_CALL
        for begin in range(0, max(len(prompt), len(outputs)), size):
            parts = (_padded(ids[begin : begin + size], size, self._vocab_size) for ids in (prompt, outputs))
            prefix = PrefixTokens(np.int32(sequence.lane), np.bool_(begin == 0), *parts)
            self._state = self._programs.prefix_tokens(self._state, prefix)

    def _set_up(self, sequence: Sequence) -> None:
        """Installs biases and masked stops, and clears what an earlier sequence of the lane left."""
        params = sequence.request.params
        bias = params.logit_bias
        stops = sorted(sequence.stop_ids) if params.min_tokens else []
        if not (bias or stops or sequence.lane in self._set_up_lanes):
            return
        ids = _padded(bias, MAX_LOGIT_BIASES, self._vocab_size)
        values = np.zeros(MAX_LOGIT_BIASES, np.float32)
        values[: len(bias)] = list(bias.values())
        setup = LaneSetup(
            np.int32(sequence.lane),
            ids,
            values,
            _padded(stops, MAX_MASKED_STOPS, self._vocab_size),
        )
        self._state = self._programs.lane_setup(self._state, setup)
        self._set_up_lanes.discard(sequence.lane)
        if bias or stops:
            self._set_up_lanes.add(sequence.lane)

    def _fork(self, forks: tuple[Fork, ...]) -> None:
        for begin in range(0, len(forks), FORKS_A_CALL):
            copies = no_forks(len(self._shapes.tables), self._num_lanes)
            for place, fork in enumerate(forks[begin : begin + FORKS_A_CALL]):
                copies.source_lanes[place], copies.target_lanes[place] = fork.source, fork.target
                inherits = self._set_up_lanes.add if fork.source in self._set_up_lanes else self._set_up_lanes.discard
                inherits(fork.target)
                for group, source, target in fork.copies:
                    copies.source_pages[group, place] = source
                    copies.target_pages[group, place] = target
            self._state = self._programs.forks(self._state, copies)


def _padded(ids: Iterable[int], size: int, fill: int) -> np.ndarray:
    padded = np.full(size, fill, np.int32)
    given = list(ids)
    padded[: len(given)] = given
    return padded


def _logprobs(outputs: TopLogprobs) -> Logprobs:
    return Logprobs(*(np.asarray(part) for part in outputs))
