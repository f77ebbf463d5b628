"""Who runs in the next step: continuous batching under one token budget.

Owns: the requests and the order of a step: who is served before whom. Must never: import jax, fill buffers, or know
text. The scheduler runs one step ahead of the device: ``schedule`` is called before the tokens of the step before are
committed.

Why nothing starves or deadlocks. ``Admission`` bounds how long anyone is passed over. Where blocks lack, a younger
sequence gives way, never the oldest; the pools hold one sequence of any admissible length (``KVLayout`` refuses others
at start), so the oldest can always go on, ends, and makes the next one the oldest.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable

from hkv_jax.engine.admission import Admission
from hkv_jax.engine.block_moves import BlockMoves
from hkv_jax.engine.commit import commit_step
from hkv_jax.engine.draft import Draft
from hkv_jax.engine.plan import StepPlan
from hkv_jax.engine.prefix_stats import PrefixStats
from hkv_jax.engine.request import NO_LANE, Request, Sequence, SequenceState
from hkv_jax.engine.running import Running
from hkv_jax.engine.scheduler_config import SchedulerConfig
from hkv_jax.engine.step_result import StepResult
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.errors import RequestError
from hkv_jax.kvcache.manager import CacheManager
from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.kvcache.room import Demand
from hkv_jax.outputs import FinishReason


class Scheduler:
    """Decides each step and takes its tokens.

    Invariants. S1: a sequence has computed between 0 and all of its tokens. S2: it is in exactly one state, and only
    where that state belongs. S3: a plan never exceeds the budget in tokens nor ``max_num_seqs`` in rows. S4: the oldest
    running sequence is never preempted. M2: who does not run holds no block.
    """

    def __init__(
        self, config: SchedulerConfig, cache: CacheManager, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """An idle scheduler over a ``cache`` of ``config.max_num_seqs`` closed lanes; ``clock`` counts seconds."""
        self.config = config
        self._clock = clock
        self._cache = cache
        self._waiting = Admission(config, cache.prefixes, clock)
        self._running = Running(config.max_num_seqs, cache, self._waiting)
        self._moves = BlockMoves(cache)
        self._prefix_stats = PrefixStats()
        self._requests: dict[str, list[Sequence]] = {}
        self._arrivals = itertools.count()
        self._num_siblings = 0  # waiting to share their leader's prompt
        self.lanes = self._running.lanes

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
    def num_preemptions(self) -> int:
        """Preemptions since the start."""
        return self._running.num_preemptions

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
            self._waiting.add(sequence)

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
        self._running.retire_ending()
        draft = Draft(self.config.max_num_batched_tokens)
        self._moves.gather(draft, self.lanes)
        self._running.record_decodes()
        self._running.draft_decodes(draft)
        self._continue_prefills(draft)
        if not draft.short:
            self._admit(draft)
        plan = self._running.dispatch(draft)
        if plan is not None:
            self._moves.clear()
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Takes the tokens of a plan, in the order plans were made."""
        return commit_step(plan, result, self._finish)

    def reset(self) -> None:
        """Every step in flight is lost, and with it all K/V: what was read stays, everything else is computed again."""
        living = list(itertools.chain.from_iterable(self._requests.values()))
        lost = [s for s in living if s.state in (SequenceState.RUNNING, SequenceState.ENDING)]
        self._running.lose_all()
        self._moves.clear()
        self._cache.reset()
        for sequence in living:
            sequence.in_flight = 0
        for sequence in lost:
            self._waiting.add(sequence)

    def check_invariants(self) -> None:
        """Asserts S1, S2, S4 and M2, and the cache's own."""
        living = [sequence for family in self._requests.values() for sequence in family]
        queued = {id(sequence) for sequence in self._waiting}
        pending = {id(sibling) for sequence in living for sibling in sequence.siblings}
        assert len(pending) == self._num_siblings, "S2: siblings miscounted"
        for sequence in living:
            waits = sequence.state is SequenceState.WAITING
            waits_somewhere = (id(sequence) in queued) != (id(sequence) in pending)
            assert waits == waits_somewhere, "S2: waiting, but not where it should"
            running = sequence.state is SequenceState.RUNNING
            assert running == (sequence.lane != NO_LANE), "S2: only running sequences own a lane"
        num_running = sum(sequence.state is SequenceState.RUNNING for sequence in living)
        assert num_running == self.lanes.num_running, "S2: a lane without a living sequence"
        self._running.check_invariants()
        self._cache.check_invariants()

    def _continue_prefills(self, draft: Draft) -> None:
        """Chunks of the running sequences that have known tokens to compute, oldest first."""
        # A chunk may preempt sequences behind its own, never before it; a leader's siblings come right behind it.
        prefilling, index = self._running.prefilling, 0
        while index < len(prefilling) and draft.budget > 0:
            sequence = prefilling[index]
            index += 1
            start = int(self.lanes.positions[sequence.lane])
            if sequence.siblings and start == sequence.prefill_end:
                self._fork_siblings(sequence, draft)
            end = self._chunk_end(sequence, start, draft.budget)
            if self._running.make_room(sequence, end, draft):
                draft.add_chunk(sequence, start, end)

    def _fork_siblings(self, leader: Sequence, draft: Draft) -> None:
        """Lets the siblings of ``leader`` share its prompt; those without lane or blocks wait and compute it again."""
        siblings, leader.siblings = leader.siblings, []
        self._num_siblings -= len(siblings)
        for sibling in siblings:
            if not self._running.fork(leader, sibling, draft):
                self._waiting.add(sibling)

    def _admit(self, draft: Draft) -> None:
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

    def _admit_one(self, sequence: Sequence, use: PrefixUse, draft: Draft) -> bool:
        """Takes a sequence from the queue into a lane; False where blocks lack."""
        if self.lanes.num_running and not self._fits(sequence, use, draft.budget):
            return False
        use = self._waiting.revise(sequence)
        end = self._first_chunk_end(sequence, use, draft.budget)
        if not self._running.admit(sequence, use, end, draft):
            return False
        self._waiting.remove(sequence)
        self._waiting.note_prefill(sequence, use)
        self._count_admission(sequence, use)
        return True

    def _fits(self, sequence: Sequence, use: PrefixUse, budget: int) -> bool:
        """Whether a sequence could be admitted and go on with those that run."""
        end = self._first_chunk_end(sequence, use, budget)
        demand = Demand(
            num_tokens=sequence.num_tokens,
            max_tokens=sequence.max_total_tokens,
            chunk_end=end,
            keep_from=sequence.prefill.keep_from(use.start, end),
            path=sequence.prefill.path,
            use=use,
        )
        return self._cache.room.fits(demand, self._running.promised())

    def _count_admission(self, sequence: Sequence, use: PrefixUse) -> None:
        sequence.prefix = use
        if sequence.first_prefix is not None:
            self._prefix_stats = self._prefix_stats.after_readmission(sequence.num_tokens, use)
            return
        sequence.first_prefix = use
        if sequence.sample == 0:
            self._prefix_stats = self._prefix_stats.after_admission(sequence.request.prompt_len, use)

    def _first_chunk_end(self, sequence: Sequence, use: PrefixUse, budget: int) -> int:
        """Where the first chunk of a sequence ends that begins with ``use``; decides where it leaves join points."""
        if self._cache.policy.enabled:
            sequence.prefill.plan_checkpoints(sequence.prefill_end, use)
        return self._chunk_end(sequence, use.start, budget)

    def _chunk_end(self, sequence: Sequence, start: int, budget: int) -> int:
        """Where a chunk from ``start`` ends.

        One that does not end the known tokens ends at a multiple of the largest block where it can, so that blocks
        fill up together; one that passes a join point far from its end ends there.
        """
        known, multiple = sequence.prefill_end, self._cache.layout.largest_block_size
        end = min(known, start + min(budget, self.config.max_prefill_chunk))
        aligned = end - end % multiple
        if start < aligned and end < known:
            end = aligned
        deep = sequence.prefill.first_deep_checkpoint(start, end)
        return end if deep is None else deep

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
        self._running.release(sequence)
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if all(member.state is SequenceState.FINISHED for member in family):
            del self._requests[sequence.request.request_id]
