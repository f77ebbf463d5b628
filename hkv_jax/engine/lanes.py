"""The running sequences as arrays: one entry a lane, so that a decode step costs a few numpy calls, not a loop.

Owns: which sequence runs in which lane, how far each is, and its sampling parameters in the form the step takes. Must
never: import jax, or decide anything (the scheduler does).
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from hkv_jax.engine.request import NO_LANE, Sequence

FLOAT_FIELDS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
"""Rows of ``Lanes.floats``, in the order of the packed f32 buffer."""


class Lanes:
    """State of ``num_lanes`` lanes; arrays are [num_lanes], read freely, written only here and by the scheduler.

    Attributes:
        sequences: the sequence of each lane, or ``None``.
        positions i32: tokens computed by the steps dispatched so far, which is where the next query stands.
        limits i32: no query at or above this position: the sequence then has all the tokens it may have.
        decoding bool: the next query is the token the lane drew last.
        prompt_lens, min_tokens, samples, top_k, num_logprobs i32: as in ``StepFields``.
        record_at i32: when it has computed so many tokens, a block is full that the prefix cache does not know yet.
        context_starts i32: below it the lane's sliding groups hold nothing; 0 but after a rebuilt prefix.
        seeds i32[num_lanes, 2]: high and low seed word, the bits of two u32.
        floats f32[6, num_lanes]: the rows of ``FLOAT_FIELDS``.
    """

    def __init__(self, num_lanes: int) -> None:
        self.num_lanes = num_lanes
        self.sequences: list[Sequence | None] = [None] * num_lanes
        self.positions = np.zeros(num_lanes, np.int32)
        self.limits = np.zeros(num_lanes, np.int32)
        self.decoding = np.zeros(num_lanes, np.bool_)
        self.prompt_lens = np.zeros(num_lanes, np.int32)
        self.min_tokens = np.zeros(num_lanes, np.int32)
        self.samples = np.zeros(num_lanes, np.int32)
        self.top_k = np.zeros(num_lanes, np.int32)
        self.num_logprobs = np.zeros(num_lanes, np.int32)
        self.context_starts = np.zeros(num_lanes, np.int32)
        self.record_at = np.zeros(num_lanes, np.int32)
        self.seeds = np.zeros((num_lanes, 2), np.int32)
        self.floats = np.zeros((len(FLOAT_FIELDS), num_lanes), np.float32)
        self._free = list(range(num_lanes))
        self._decode_rows: tuple[NDArray[np.int32], tuple[Sequence, ...]] | None = None

    @property
    def num_free(self) -> int:
        """Lanes without a sequence."""
        return len(self._free)

    @property
    def num_running(self) -> int:
        """Lanes with a sequence."""
        return self.num_lanes - len(self._free)

    def running(self) -> list[Sequence]:
        """The running sequences, by lane."""
        return [sequence for sequence in self.sequences if sequence is not None]

    def open(self, sequence: Sequence, position: int) -> int:
        """Gives the lowest free lane to ``sequence``, ``position`` of whose tokens are computed; returns the lane."""
        lane = heapq.heappop(self._free)
        params = sequence.request.params
        sequence.lane = lane
        self.sequences[lane] = sequence
        self.positions[lane] = position
        self.limits[lane] = sequence.max_total_tokens - 1
        self.prompt_lens[lane] = sequence.request.prompt_len
        self.min_tokens[lane] = params.min_tokens
        self.samples[lane] = sequence.sample
        self.top_k[lane] = min(params.top_k, 2**31 - 1)
        self.num_logprobs[lane] = 0 if params.logprobs is None else params.logprobs + 1
        self.context_starts[lane] = 0
        self.seeds[lane] = np.array(sequence.request.seed_words, np.uint32).view(np.int32)
        self.floats[:, lane] = [getattr(params, field) for field in FLOAT_FIELDS]
        return lane

    def close(self, sequence: Sequence) -> int:
        """Takes the lane from ``sequence``; returns the lane."""
        lane = sequence.lane
        assert self.sequences[lane] is sequence, f"lane {lane} belongs to another sequence"
        sequence.lane = NO_LANE
        self.sequences[lane] = None
        heapq.heappush(self._free, lane)
        self.set_decoding(lane, False)
        return lane

    def set_decoding(self, lane: int, decoding: bool) -> None:
        """Says whether the lane's next query is the token it drew last."""
        self.decoding[lane] = decoding
        self._decode_rows = None

    def decode_rows(self) -> tuple[NDArray[np.int32], tuple[Sequence, ...]]:
        """The decoding lanes, i32 ascending, and their sequences; kept until one of them changes."""
        if self._decode_rows is None:
            lanes = np.flatnonzero(self.decoding).astype(np.int32)
            self._decode_rows = lanes, self.sequences_of(lanes)
        return self._decode_rows

    def sequences_of(self, lanes: NDArray[np.int32]) -> tuple[Sequence, ...]:
        """The sequences of lanes that all have one."""
        rows = []
        for lane in lanes.tolist():
            sequence = self.sequences[lane]
            assert sequence is not None, f"lane {lane} has no sequence"
            rows.append(sequence)
        return tuple(rows)
