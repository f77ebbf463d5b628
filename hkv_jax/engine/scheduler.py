"""Who runs in the next step: continuous batching under one token budget.

Owns: the life of every sequence, from the queue to its last token. Must never: import jax, fill buffers, or know text.
The scheduler runs one step ahead of the device: ``schedule`` is called before the tokens of the step before are
committed.

Why nothing starves or deadlocks. ``Admission`` bounds how long anyone is passed over. Where blocks lack, a younger
sequence gives way, never the oldest; the pools hold one sequence of any admissible length (``KVLayout`` refuses others
at start), so the oldest can always go on, ends, and makes the next one the oldest.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hkv_jax.engine.admission import Admission
from hkv_jax.engine.commit import commit_step
from hkv_jax.engine.lanes import Lanes
from hkv_jax.engine.plan import BlockCopy, Chunk, DecodeRows, LaneTables, StepPlan
from hkv_jax.engine.prefill import Prefill
from hkv_jax.engine.prefix_stats import PrefixStats
from hkv_jax.engine.request import NO_LANE, Request, Sequence, SequenceState
from hkv_jax.engine.step_result import StepResult
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.errors import RequestError
from hkv_jax.kvcache.join_point import JoinKind
from hkv_jax.kvcache.manager import GROWTH_TOKENS, CacheManager, Demand, Fork
from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.outputs import FinishReason


@dataclasses.dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step and of a sequence, in sequences and tokens.

    ``max_prefill_chunk`` bounds the tokens of *one* sequence in a step; ``max_model_len`` its prompt and output
    together; ``max_bypass_seconds`` how long others may be admitted before an older one; ``max_prefix_wait_seconds``
    how long one waits for a prefix that another computes.

    Raises:
        ValueError: a limit is below 1, or the step's budget has not one token for every running sequence.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_prefill_chunk: int
    max_model_len: int
    vocab_size: int
    max_bypass_seconds: float = 30.0
    max_prefix_wait_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 0 if field.name.endswith("_seconds") else 1
            if getattr(self, field.name) < least:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be at least {least}")
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
    table_rows: list[LaneTables] = dataclasses.field(default_factory=list)
    admitted: list[Sequence] = dataclasses.field(default_factory=list)
    forks: list[Fork] = dataclasses.field(default_factory=list)
    short: bool = False


class Scheduler:
    """Decides each step and takes its tokens. ``num_preemptions`` counts them since the start.

    Invariants. S1: a sequence has computed between 0 and all of its tokens. S2: it is in exactly one state, and only
    where that state belongs. S3: a plan never exceeds the budget in tokens nor ``max_num_seqs`` in rows. S4: the oldest
    running sequence is never preempted. M2: who does not run holds no block.
    """

    def __init__(
        self, config: SchedulerConfig, cache: CacheManager, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """An idle scheduler over a ``cache`` of ``config.max_num_seqs`` closed lanes; ``clock`` counts seconds."""
        self.config = config
        self.lanes = Lanes(config.max_num_seqs)
        self.num_preemptions = 0
        self._clock = clock
        self._cache = cache
        self._prefix_stats = PrefixStats()
        self._chunk_multiple = cache.layout.largest_block_size
        self._requests: dict[str, list[Sequence]] = {}
        self._waiting = Admission(cache.prefixes, config.max_bypass_seconds, config.max_prefix_wait_seconds)
        self._prefilling: list[Sequence] = []  # running, with known tokens still to compute; oldest first
        self._ending: list[Sequence] = []  # the last plan draws their last token
        self._arrivals = itertools.count()
        self._untold_copies: list[BlockCopy] = []  # blocks that moved, of which the device does not know
        self._untold_lanes: set[int] = set()  # and lanes whose tables name them
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

    @property
    def prefix_stats(self) -> PrefixStats:
        """What the prefix cache saved."""
        return dataclasses.replace(self._prefix_stats, prefix_waits=self._waiting.num_prefix_waits)

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
            self._enqueue(sequence)

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
        self._cache.prefixes.now = self._clock()
        self._retire_ending()
        draft = _Draft(budget=self.config.max_num_batched_tokens)
        self._gather(draft)
        self._record_decodes()
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
        lost = []
        for sequence in itertools.chain.from_iterable(self._requests.values()):
            sequence.in_flight = 0
            if sequence.state in (SequenceState.RUNNING, SequenceState.ENDING):
                self._release_lane(sequence, lost=True)
                lost.append(sequence)
        self._ending.clear()
        self._untold_copies.clear()
        self._untold_lanes.clear()
        self._cache.reset()
        for sequence in lost:
            self._enqueue(sequence)

    def check_invariants(self) -> None:
        """Asserts S1, S2 and M2, and the cache's own."""
        living = [sequence for group in self._requests.values() for sequence in group]
        queued = {id(sequence) for sequence in self._waiting}
        pending = {id(sibling) for sequence in living for sibling in sequence.siblings}
        assert len(pending) == self._num_siblings, "S2: siblings miscounted"
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

    def _gather(self, draft: _Draft) -> None:
        """Lets the cache move blocks together; what no plan has told the device yet stays with the next one."""
        copies, moved = self._cache.gather()
        self._untold_copies += [BlockCopy(*copy) for copy in copies]
        self._untold_lanes.update(moved)
        for lane in sorted(self._untold_lanes):
            if self.lanes.sequences[lane] is not None:
                draft.table_rows.append(LaneTables(lane, self._cache.table_rows(lane)))

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
        """Gives lanes to waiting sequences while there are lanes, blocks and budget.

        Who does not fit holds up all but those whose prefix is held by running sequences: they take next to nothing.
        """
        while len(self._waiting) and self.lanes.num_free and draft.budget > 0:
            candidate = self._waiting.next()
            if candidate is None or candidate[0].in_flight:
                return
            if self._admit_one(*candidate, draft):
                continue
            candidate = self._waiting.next_beside(candidate[0])
            if candidate is None or candidate[0].in_flight or not self._admit_one(*candidate, draft):
                return

    def _admit_one(self, sequence: Sequence, use: PrefixUse, draft: _Draft) -> bool:
        """Takes a sequence from the queue into a lane; False where blocks lack."""
        if self.lanes.num_running and not self._fits(sequence, use, draft.budget):
            return False
        prefill = sequence.prefill
        use = self._waiting.revised(sequence)
        prefill.plan_checkpoints(self._known_end(sequence), use)
        end = self._chunk_end(sequence, use.start, draft.budget)
        lane = self.lanes.open(sequence, position=use.start)
        loaded = self._cache.open(lane, prefill.path, use)
        rows = self._cache.table_rows(lane) if loaded else ()
        if not self._cache.extend(lane, use.start, end, prefill.keep_from(use.start, end)):
            assert self.lanes.num_running > 1, f"the pools hold less than one sequence of {sequence.num_tokens} tokens"
            self._cache.close(self.lanes.close(sequence))
            return False
        self._waiting.remove(sequence)
        self.lanes.context_starts[lane] = use.context_start
        self._note_admission(sequence, use)
        if loaded:
            draft.table_rows.append(LaneTables(lane, rows))
        sequence.state = SequenceState.RUNNING
        bisect.insort(self._prefilling, sequence, key=_age)
        draft.admitted.append(sequence)
        self._add_chunk(sequence, end, draft)
        return True

    def _fits(self, sequence: Sequence, use: PrefixUse, budget: int) -> bool:
        """Whether a sequence could be admitted and go on with those that run."""
        prefill, known_end = sequence.prefill, self._known_end(sequence)
        prefill.plan_checkpoints(known_end, use)
        end = self._chunk_end(sequence, use.start, budget)
        growth = min(GROWTH_TOKENS, sequence.max_total_tokens - sequence.num_tokens)
        demand = Demand(sequence.num_tokens, end, prefill.keep_from(use.start, end), growth)
        busy = [lane for lane, other in enumerate(self.lanes.sequences) if other is not None]
        prefilling = [(other.lane, other.num_tokens) for other in self._prefilling]
        positions = np.maximum(self.lanes.positions[busy], self.lanes.prompt_lens[busy])
        promised = self._cache.promised(prefilling, positions, self.lanes.limits[busy])
        return self._cache.has_room(demand, prefill.path, use, promised)

    def _note_admission(self, sequence: Sequence, use: PrefixUse) -> None:
        sequence.prefix = use
        if sequence.first_prefix is not None:
            self._prefix_stats = self._prefix_stats.after_readmission(sequence.num_tokens, use)
        elif sequence.sample == 0:
            self._prefix_stats = self._prefix_stats.after_admission(sequence.request.prompt_len, use)
        if sequence.first_prefix is None:
            sequence.first_prefix = use
        self._waiting.note_prefill(sequence, use)

    def _known_end(self, sequence: Sequence) -> int:
        """Where the first chunks of a sequence end: a prompt that is shared is cut before its last token."""
        return sequence.request.prompt_len - 1 if sequence.siblings else sequence.num_tokens

    def _chunk_end(self, sequence: Sequence, start: int, budget: int) -> int:
        """Where a chunk from ``start`` ends.

        One that does not end the known tokens ends at a multiple of the largest block where it can, so that blocks
        fill up together; one that passes a join point far from its end ends there. A prompt that several samples share
        is cut before its last token, which each sample runs by itself.
        """
        known = self._known_end(sequence)
        end = min(known, start + min(budget, self.config.max_prefill_chunk))
        aligned = end - end % self._chunk_multiple
        if start < aligned and end < known:
            end = aligned
        deep = sequence.prefill.first_deep_checkpoint(start, end)
        return end if deep is None else deep

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
                self.lanes.context_starts[lane] = self.lanes.context_starts[leader.lane]
                fork = self._cache.fork(leader.lane, lane, num_tokens)
                if fork is None:
                    self.lanes.close(sibling)
            if fork is None:
                self._enqueue(sibling)
                continue
            sibling.prefill = leader.prefill.of_sibling()
            sibling.state = SequenceState.RUNNING
            draft.forks.append(fork)
            bisect.insort(self._prefilling, sibling, key=_age)

    def _make_room(self, sequence: Sequence, end: int, draft: _Draft) -> bool:
        """Blocks for tokens up to ``end``, at the cost of younger sequences.

        False: ``sequence`` is the youngest; it keeps what it holds and sits this step out.
        """
        start = int(self.lanes.positions[sequence.lane])
        keep_from = sequence.prefill.keep_from(start, end)
        while not self._cache.extend(sequence.lane, start, end, keep_from):
            draft.short = True
            victim = self._victim(sequence)
            if victim is None:
                assert self.lanes.num_running > 1, f"S4: the pools hold less than one sequence of {end} tokens"
                return False
            self._preempt(victim, draft)
        return True

    def _victim(self, needy: Sequence) -> Sequence | None:
        """Of the sequences younger than ``needy``, the one whose preemption loses least work."""
        younger = [other for other in self.lanes.running() if other.age > needy.age]
        if not younger:
            return None

        def lost_work(other: Sequence) -> tuple[int, tuple[int, int]]:
            cached = 0 if other.prefix is None else other.prefix.start
            return int(self.lanes.positions[other.lane]) - cached, (-other.age[0], -other.age[1])

        return min(younger, key=lost_work)

    def _preempt(self, sequence: Sequence, draft: _Draft) -> None:
        """Back to the queue; a token that is drawn but not read comes first, then all is computed again."""
        sequence.in_flight = max(0, int(self.lanes.positions[sequence.lane]) + 1 - sequence.num_tokens)
        self.num_preemptions += 1
        draft.forks = [fork for fork in draft.forks if fork.target != sequence.lane]
        draft.table_rows = [rows for rows in draft.table_rows if rows.lane != sequence.lane]
        self._release_lane(sequence)
        self._enqueue(sequence)

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
        copies, self._untold_copies = tuple(self._untold_copies), []
        self._untold_lanes.clear()
        return StepPlan(decode, chunks, tuple(draft.admitted), tuple(draft.forks), copies, tuple(draft.table_rows))

    def _advance_decodes(self, lanes: NDArray[np.int32]) -> None:
        self.lanes.positions[lanes] += 1
        for lane in lanes[self.lanes.positions[lanes] >= self.lanes.limits[lanes]].tolist():
            self._note_ending(lane)

    def _advance_chunk(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        lane = sequence.lane
        self.lanes.positions[lane] = chunk.end
        self._record_chunk(chunk)
        if chunk.samples:
            self._prefilling.remove(sequence)
            self._waiting.note_end(sequence)
            self.lanes.set_decoding(lane, True)
            if chunk.end >= self.lanes.limits[lane]:
                self._note_ending(lane)

    def _note_ending(self, lane: int) -> None:
        """Its last token is on its way; it keeps its lane until this plan is built."""
        sequence = self.lanes.sequences[lane]
        assert sequence is not None
        self.lanes.set_decoding(lane, False)
        self._ending.append(sequence)

    def _record_decodes(self) -> None:
        """Puts into the prefix cache the blocks that decoding sequences have filled with tokens that were read."""
        if not self._cache.policy.enabled:
            return
        lanes, _ = self.lanes.decode_rows()
        for lane in lanes[self.lanes.positions[lanes] >= self.lanes.record_at[lanes]].tolist():
            sequence = self.lanes.sequences[lane]
            assert sequence is not None
            settled = self._settled(sequence)
            if settled >= self.lanes.record_at[lane]:
                sequence.prefill.extend(sequence, settled)
                last = settled - settled % self._chunk_multiple
                self._cache.record(lane, sequence.prefill.chain, settled, {last: JoinKind.RUNNING})
                self.lanes.record_at[lane] = last + self._chunk_multiple

    def _record_chunk(self, chunk: Chunk) -> None:
        """Puts what a chunk computes into the prefix cache; plans after this one may use it."""
        sequence, prefill = chunk.sequence, chunk.sequence.prefill
        if not self._cache.policy.enabled:
            return
        prefill.extend(sequence, chunk.end)
        joins = {p: kind for p, kind in prefill.checkpoints.items() if chunk.start < p <= chunk.end}
        self._cache.record(sequence.lane, prefill.chain, chunk.end, joins)
        self.lanes.record_at[sequence.lane] = chunk.end - chunk.end % self._chunk_multiple + self._chunk_multiple
        self._waiting.note_progress(sequence, chunk.end)

    def _settled(self, sequence: Sequence) -> int:
        """Tokens of a running sequence that are known and whose K/V some planned step writes."""
        return min(int(self.lanes.positions[sequence.lane]), sequence.num_tokens)

    def _release_lane(self, sequence: Sequence, lost: bool = False) -> None:
        """Takes the lane; its blocks can be found again unless their contents are ``lost``."""
        if sequence.lane != NO_LANE:
            settled, prefill = self._settled(sequence), sequence.prefill
            lane = self.lanes.close(sequence)
            if lost or not self._cache.policy.enabled:
                self._cache.close(lane)
            else:
                prefill.extend(sequence, settled)
                self._cache.close(lane, prefill.chain, settled)
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
            self._waiting.note_end(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        if self._cache.policy.enabled:
            sequence.prefill = Prefill.of(sequence, self._known_end(sequence), self._chunk_multiple)
        sequence.prefill.queued_at = self._clock()
        self._waiting.add(sequence)

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
