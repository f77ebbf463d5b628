"""Who runs in the next step: continuous batching under one token budget, first come first served.

Owns: the life of every sequence, from the queue to its last token. Must never: import jax, fill buffers, or know text.
The scheduler runs one step ahead of the device: ``schedule`` is called before the tokens of the step before are
committed.

Why nothing starves or deadlocks. The queue is served in order of age and nobody is admitted past its head. Where blocks
lack, the youngest running sequence gives way, never the oldest; the pools hold one sequence of any admissible length
(``KVLayout`` refuses others at start), so the oldest can always go on, ends, and makes the next one the oldest.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools

import numpy as np
from numpy.typing import NDArray

from hkv_jax.engine.commit import commit_step
from hkv_jax.engine.lanes import Lanes
from hkv_jax.engine.plan import Chunk, DecodeRows, StepPlan
from hkv_jax.engine.request import NO_LANE, Request, Sequence, SequenceState
from hkv_jax.engine.step_result import StepResult
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.engine.waiting_queue import WaitingQueue
from hkv_jax.errors import RequestError
from hkv_jax.kvcache.manager import CacheManager, Fork
from hkv_jax.outputs import FinishReason


@dataclasses.dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step and of a sequence, in sequences and tokens.

    ``max_prefill_chunk`` bounds the tokens of *one* sequence in a step; ``max_model_len`` its prompt and output
    together.

    Raises:
        ValueError: a limit is below 1, or the step's budget has not one token for every running sequence.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_prefill_chunk: int
    max_model_len: int
    vocab_size: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least max_num_seqs, "
                f"{self.max_num_seqs}, since every running sequence takes a token of each step"
            )

    def check(self, request: Request) -> None:
        """Refuses what could never be served.

        Raises:
            RequestError: the prompt is too long, or an id is outside the vocabulary.
        """
        limit = self.max_model_len
        if request.prompt_len >= limit:
            raise RequestError(
                f"the prompt has {request.prompt_len} tokens; max_model_len {limit} leaves room for at most {limit - 1}"
            )
        if int(request.prompt.max()) >= self.vocab_size:
            raise RequestError(f"the prompt holds an id outside the vocabulary; ids are 0 to {self.vocab_size - 1}")
        request.params.check_for_model(self.vocab_size)


@dataclasses.dataclass(slots=True)
class _Draft:
    """A plan in the making. ``short``: somebody lacked blocks, so nobody new is admitted."""

    budget: int
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    admitted: list[Sequence] = dataclasses.field(default_factory=list)
    forks: list[Fork] = dataclasses.field(default_factory=list)
    short: bool = False


class Scheduler:
    """Decides each step and takes its tokens. ``num_preemptions`` counts them since the start.

    Invariants. S1: a sequence has computed between 0 and all of its tokens. S2: it is in exactly one state, and only
    where that state belongs. S3: a plan never exceeds the budget in tokens nor ``max_num_seqs`` in rows. S4: the oldest
    running sequence is never preempted. M2: who does not run holds no block.
    """

    def __init__(self, config: SchedulerConfig, cache: CacheManager) -> None:
        """An idle scheduler over a ``cache`` of ``config.max_num_seqs`` closed lanes."""
        self.config = config
        self.lanes = Lanes(config.max_num_seqs)
        self.num_preemptions = 0
        self._cache = cache
        self._chunk_multiple = cache.layout.largest_block_size
        self._requests: dict[str, list[Sequence]] = {}
        self._waiting = WaitingQueue()
        self._prefilling: list[Sequence] = []  # running, with known tokens still to compute; oldest first
        self._ending: list[Sequence] = []  # the last plan draws their last token
        self._arrivals = itertools.count()
        self._num_siblings = 0  # waiting to share their leader's prompt

    @property
    def has_work(self) -> bool:
        """Whether any request lives."""
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Sequences that own a lane."""
        return self.lanes.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences that will need a lane, those included that wait to share their leader's prompt."""
        return len(self._waiting) + self._num_siblings

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: it could never be served: too long, ids outside the vocabulary, or its id is in use.
        """
        if request.request_id in self._requests:
            raise RequestError(f"request_id {request.request_id!r} is in use; choose another")
        self.config.check(request)
        arrival = next(self._arrivals)
        samples = range(request.params.n)
        sequences = [Sequence.create(request, sample, arrival, self.config.max_model_len) for sample in samples]
        self._requests[request.request_id] = sequences
        # All but the last prompt token are computed once for all samples; of a single token there is nothing to share.
        queued = len(sequences) if request.prompt_len == 1 else 1
        sequences[0].siblings = sequences[queued:]
        self._num_siblings += len(sequences) - queued
        for sequence in sequences[:queued]:
            self._waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Ends every sample of a request now; its blocks are free for the next plan. An unknown id is ignored."""
        for sequence in list(self._requests.get(request_id, ())):
            self._finish(sequence, FinishReason.ABORT, None)

    def finish(self, request_id: str, sample: int) -> None:
        """Ends one sample whose text reached a stop string. One that has ended already is ignored."""
        for sequence in list(self._requests.get(request_id, ())):
            if sequence.sample == sample:
                self._finish(sequence, FinishReason.STOP, None)

    def schedule(self) -> StepPlan | None:
        """The next step, or ``None`` when nobody can run before the step in flight is committed.

        A plan must be built and dispatched before ``schedule`` is called again.
        """
        self._retire_ending()
        draft = _Draft(budget=self.config.max_num_batched_tokens)
        lanes = self._decodes_with_room(draft)
        draft.budget -= len(lanes)
        self._continue_prefills(draft)
        if not draft.short:
            self._admit(draft)
        return self._complete(lanes, draft)

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Takes the tokens of a plan, in the order plans were made."""
        return commit_step(plan, result, self._finish)

    def reset(self) -> None:
        """Every step in flight is lost, and with it all K/V: what was read stays, everything else is computed again."""
        for sequence in itertools.chain.from_iterable(self._requests.values()):
            sequence.in_flight = 0
            if sequence.state in (SequenceState.RUNNING, SequenceState.ENDING):
                self._release_lane(sequence)
                self._enqueue_again(sequence)
        self._ending.clear()

    def check_invariants(self) -> None:
        """Asserts S1, S2 and M2, and the cache's own."""
        living = [sequence for group in self._requests.values() for sequence in group]
        queued = {id(sequence) for sequence in self._waiting}
        pending = {id(sibling) for sequence in living for sibling in sequence.siblings}
        assert len(pending) == self._num_siblings, "S2: siblings miscounted"
        ages = [sequence.age for sequence in self._waiting]
        assert ages == sorted(ages), "S2: the queue is out of order"
        for sequence in living:
            running = sequence.state is SequenceState.RUNNING
            waits = sequence.state is SequenceState.WAITING
            assert waits == ((id(sequence) in queued) != (id(sequence) in pending)), (
                "S2: waiting, but not where it should"
            )
            assert running == (sequence.lane != NO_LANE), "S2: only running sequences own a lane"
            if running:
                assert self.lanes.sequences[sequence.lane] is sequence, "S2: a lane with two owners"
                assert 0 <= self.lanes.positions[sequence.lane] <= sequence.max_total_tokens - 1, "S1"
        num_running = sum(sequence.state is SequenceState.RUNNING for sequence in living)
        assert num_running == self.lanes.num_running, "S2: a lane without a living sequence"
        assert all(sequence.state is SequenceState.RUNNING for sequence in self._prefilling), "S2"
        assert self._prefilling == sorted(self._prefilling, key=_age), "S4: a younger sequence is served first"
        self._cache.check_invariants()

    def _retire_ending(self) -> None:
        """Frees those whose last token the step in flight draws: the device runs that step before any that follows."""
        for sequence in self._ending:
            if sequence.state is SequenceState.RUNNING:
                self._release_lane(sequence)
                sequence.state = SequenceState.ENDING
        self._ending.clear()

    def _decodes_with_room(self, draft: _Draft) -> NDArray[np.int32]:
        """The decoding lanes that have room for one more token, oldest served first where blocks lack."""
        lanes, _ = self.lanes.decode_rows()
        needy = lanes[self.lanes.positions[lanes] >= self._cache.watermarks[lanes]]
        stalled = []
        for sequence in sorted(self.lanes.sequences_of(needy), key=_age):
            if sequence.state is SequenceState.RUNNING:
                lane = sequence.lane
                if not self._make_room(sequence, int(self.lanes.positions[lane]) + 1, draft):
                    stalled.append(lane)
        return lanes[~np.isin(lanes, stalled)] if stalled else lanes

    def _continue_prefills(self, draft: _Draft) -> None:
        """Chunks of the running sequences that have known tokens to compute, oldest first."""
        # A chunk may preempt sequences behind its own, never before it; a leader's siblings come right behind it.
        index = 0
        while index < len(self._prefilling) and draft.budget > 0:
            sequence = self._prefilling[index]
            index += 1
            if sequence.siblings and self.lanes.positions[sequence.lane] == sequence.request.prompt_len - 1:
                self._fork_siblings(sequence, draft)
            end = self._chunk_end(sequence, int(self.lanes.positions[sequence.lane]), draft.budget)
            if self._make_room(sequence, end, draft):
                self._add_chunk(sequence, end, draft)

    def _admit(self, draft: _Draft) -> None:
        """Gives lanes to the head of the queue while there are lanes, blocks and budget; nobody passes the head."""
        while len(self._waiting) and self.lanes.num_free and draft.budget > 0:
            sequence = self._waiting.head
            if sequence.in_flight or (self.lanes.num_running and not self._cache.has_room(sequence.num_tokens)):
                return
            end = self._chunk_end(sequence, 0, draft.budget)
            lane = self.lanes.open(self._waiting.pop(), position=0)
            sequence.state = SequenceState.RUNNING
            self._cache.open(lane)
            roomy = self._cache.extend(lane, 0, end)
            assert roomy, f"the pools hold less than one sequence of {sequence.num_tokens} tokens"
            bisect.insort(self._prefilling, sequence, key=_age)
            draft.admitted.append(sequence)
            self._add_chunk(sequence, end, draft)

    def _chunk_end(self, sequence: Sequence, start: int, budget: int) -> int:
        """Where a chunk from ``start`` ends.

        One that does not end the known tokens ends at a multiple of the largest block where it can, so that blocks
        fill up together. A prompt that several samples share is cut before its last token, which each sample runs by
        itself.
        """
        known = sequence.request.prompt_len - 1 if sequence.siblings else sequence.num_tokens
        end = min(known, start + min(budget, self.config.max_prefill_chunk))
        aligned = end - end % self._chunk_multiple
        return aligned if start < aligned and end < known else end

    def _add_chunk(self, sequence: Sequence, end: int, draft: _Draft) -> None:
        start = int(self.lanes.positions[sequence.lane])
        draft.chunks.append(Chunk(sequence, start, end, samples=end == sequence.num_tokens))
        draft.budget -= end - start

    def _fork_siblings(self, leader: Sequence, draft: _Draft) -> None:
        """Lets the siblings of ``leader`` share its prompt; those without lane or blocks wait and compute it again."""
        num_tokens = leader.request.prompt_len - 1
        siblings, leader.siblings = leader.siblings, []
        self._num_siblings -= len(siblings)
        for sibling in siblings:
            fork = None
            if self.lanes.num_free:
                lane = self.lanes.open(sibling, num_tokens)
                fork = self._cache.fork(leader.lane, lane, num_tokens)
                if fork is None:
                    self.lanes.close(sibling)
            if fork is None:
                self._waiting.insert(sibling)
                continue
            sibling.state = SequenceState.RUNNING
            draft.forks.append(fork)
            bisect.insort(self._prefilling, sibling, key=_age)

    def _make_room(self, sequence: Sequence, end: int, draft: _Draft) -> bool:
        """Blocks for tokens up to ``end``, at the cost of younger sequences.

        False: ``sequence`` is the youngest; it keeps what it holds and sits this step out.
        """
        start = int(self.lanes.positions[sequence.lane])
        while not self._cache.extend(sequence.lane, start, end):
            draft.short = True
            youngest = max(self.lanes.running(), key=_age)
            if youngest is sequence:
                assert self.lanes.num_running > 1, f"S4: the pools hold less than one sequence of {end} tokens"
                return False
            self._preempt(youngest, draft)
        return True

    def _preempt(self, sequence: Sequence, draft: _Draft) -> None:
        """Back to the queue; a token that is drawn but not read comes first, then all is computed again."""
        sequence.in_flight = max(0, int(self.lanes.positions[sequence.lane]) + 1 - sequence.num_tokens)
        self.num_preemptions += 1
        draft.forks = [fork for fork in draft.forks if fork.target != sequence.lane]
        self._release_lane(sequence)
        self._enqueue_again(sequence)

    def _complete(self, lanes: NDArray[np.int32], draft: _Draft) -> StepPlan | None:
        """The plan of a draft; positions advance here, at dispatch."""
        if draft.short:
            lanes = lanes[self.lanes.decoding[lanes]]
            sequences = self.lanes.sequences_of(lanes)
        else:
            sequences = self.lanes.decode_rows()[1]
        decode = DecodeRows(sequences, lanes, self.lanes.positions[lanes])
        chunks = tuple(sorted(draft.chunks, key=lambda chunk: chunk.num_tokens > 1))
        self._advance_decodes(lanes)
        for chunk in chunks:
            self._advance_chunk(chunk)
        if not sequences and not chunks:
            return None
        return StepPlan(decode, chunks, tuple(draft.admitted), tuple(draft.forks))

    def _advance_decodes(self, lanes: NDArray[np.int32]) -> None:
        self.lanes.positions[lanes] += 1
        for lane in lanes[self.lanes.positions[lanes] >= self.lanes.limits[lanes]].tolist():
            self._note_ending(lane)

    def _advance_chunk(self, chunk: Chunk) -> None:
        lane = chunk.sequence.lane
        self.lanes.positions[lane] = chunk.end
        if chunk.samples:
            self._prefilling.remove(chunk.sequence)
            self.lanes.set_decoding(lane, True)
            if chunk.end >= self.lanes.limits[lane]:
                self._note_ending(lane)

    def _note_ending(self, lane: int) -> None:
        """Its last token is on its way; it keeps its lane until this plan is built."""
        sequence = self.lanes.sequences[lane]
        assert sequence is not None
        self.lanes.set_decoding(lane, False)
        self._ending.append(sequence)

    def _release_lane(self, sequence: Sequence) -> None:
        if sequence.lane != NO_LANE:
            self._cache.close(self.lanes.close(sequence))
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)

    def _enqueue_again(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        self._waiting.insert(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | None) -> None:
        """The end of a sequence, whatever its state; nothing of it remains but its tokens."""
        if sequence.state is SequenceState.FINISHED:
            return
        family = self._requests[sequence.request.request_id]
        if sequence.state is SequenceState.WAITING:
            if sequence in family[0].siblings:
                family[0].siblings.remove(sequence)
                self._num_siblings -= 1
            else:
                self._waiting.remove(sequence)
        self._release_lane(sequence)
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if all(member.state is SequenceState.FINISHED for member in family):
            del self._requests[sequence.request.request_id]


def _age(sequence: Sequence) -> tuple[int, int]:
    return sequence.age
