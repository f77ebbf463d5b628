"""The running sequences: who owns a lane, and what of it the cache knows.

Owns: lanes from admission to release, blocks for what they compute, whom a shortage sends back to the queue, and what
they leave in the prefix cache. Must never: import jax, or choose who is admitted.
"""

from __future__ import annotations

import bisect
import operator

import numpy as np
from numpy.typing import NDArray

from hkv_jax.engine.admission import Admission
from hkv_jax.engine.draft import Draft
from hkv_jax.engine.lanes import Lanes
from hkv_jax.engine.plan import Chunk, DecodeRows, LaneTables, StepPlan
from hkv_jax.engine.request import NO_LANE, Sequence, SequenceState
from hkv_jax.kvcache.join_point import JoinKind
from hkv_jax.kvcache.manager import CacheManager
from hkv_jax.kvcache.prefix_match import PrefixUse

_age = operator.attrgetter("age")


MAX_GATHERINGS = 3
"""Plans in a row that may pass before somebody is preempted after all."""


class Running:
    """The sequences in the lanes of a cache.

    ``prefilling`` are those with known tokens still to compute, oldest first. ``num_preemptions`` counts since the
    start. Who is preempted goes to ``waiting``, which also hears how prefills get on: others may wait for them.
    """

    def __init__(self, num_lanes: int, cache: CacheManager, waiting: Admission) -> None:
        """Nobody runs; the ``num_lanes`` lanes of ``cache`` are closed."""
        self.lanes = Lanes(num_lanes)
        self.prefilling: list[Sequence] = []
        self.num_preemptions = 0
        self._cache = cache
        self._waiting = waiting
        self._block_size = cache.layout.largest_block_size
        self._num_gatherings = 0  # plans in a row for which somebody waits
        self._ending: list[Sequence] = []  # the last plan draws their last token

    def admit(self, sequence: Sequence, use: PrefixUse, end: int, draft: Draft) -> bool:
        """Gives a lane to ``sequence``, its cached prefix, and a first chunk up to ``end``; False where blocks lack."""
        prefill = sequence.prefill
        lane = self.lanes.open(sequence, position=use.start)
        loaded = self._cache.open(lane, prefill.path, use)
        # The prefix alone: what the chunk takes comes with the step's table updates.
        rows = self._cache.table_rows(lane) if loaded else ()
        if not self._cache.extend(lane, use.start, end, prefill.keep_from(use.start, end)):
            self._sit_out(sequence, end, draft)
            self._cache.close(self.lanes.close(sequence))
            return False
        self.lanes.context_starts[lane] = use.context_start
        if loaded:
            draft.table_rows.append(LaneTables(lane, rows))
        draft.admitted.append(sequence)
        draft.add_chunk(sequence, use.start, end)
        self._start(sequence)
        return True

    def fork(self, leader: Sequence, sibling: Sequence, draft: Draft) -> bool:
        """Gives ``sibling`` a lane that shares what ``leader`` has computed; False without a lane or blocks."""
        if not self.lanes.num_free:
            return False
        num_tokens = int(self.lanes.positions[leader.lane])
        lane = self.lanes.open(sibling, num_tokens)
        fork = self._cache.fork(leader.lane, lane, num_tokens)
        if fork is None:
            self.lanes.close(sibling)
            return False
        self.lanes.context_starts[lane] = self.lanes.context_starts[leader.lane]
        draft.forks.append(fork)
        sibling.prefill = leader.prefill.of_sibling()
        self._start(sibling)
        return True

    def make_room(self, sequence: Sequence, end: int, draft: Draft) -> bool:
        """Blocks for tokens up to ``end``, at the cost of younger sequences.

        False: it keeps what it holds and sits this step out, because it is the youngest, or because there is room in
        pieces, which the next plan gathers.
        """
        start = int(self.lanes.positions[sequence.lane])
        keep_from = sequence.prefill.keep_from(start, end)
        while not self._cache.extend(sequence.lane, start, end, keep_from):
            draft.short = True
            victim = self._victim(sequence)
            if self._sit_out(sequence, end, draft) or victim is None:
                return False
            self._preempt(victim, draft)
        return True

    def _sit_out(self, sequence: Sequence, end: int, draft: Draft) -> bool:
        """Whether ``sequence`` had better wait for the next plan to gather room for tokens up to ``end``.

        Raises:
            AssertionError: that did not help, and nobody else runs who could give way.
        """
        waits = self._num_gatherings < MAX_GATHERINGS and self._cache.could_gather(sequence.lane, end)
        draft.gathers = draft.gathers or waits
        alone = self.lanes.num_running == 1
        assert waits or not alone, f"S4: the pools hold less than one sequence of {end} tokens"
        return waits

    def draft_decodes(self, draft: Draft) -> None:
        """One token of each decoding lane that has room for it, oldest served first where blocks lack."""
        lanes, _ = self.lanes.decode_rows()
        needy = lanes[self.lanes.positions[lanes] >= self._cache.watermarks[lanes]]
        stalled = []
        for sequence in sorted(self.lanes.sequences_of(needy), key=_age):
            # An older one may have sent it back to the queue.
            if sequence.state is SequenceState.RUNNING:
                lane = sequence.lane
                if not self.make_room(sequence, int(self.lanes.positions[lane]) + 1, draft):
                    stalled.append(lane)
        draft.add_decodes(lanes[~np.isin(lanes, stalled)] if stalled else lanes)

    def dispatch(self, draft: Draft) -> StepPlan | None:
        """The plan of a draft, ``None`` where nobody runs; positions advance here."""
        self._num_gatherings = self._num_gatherings + 1 if draft.gathers else 0
        lanes = draft.decode_lanes
        if draft.short:
            lanes = lanes[self.lanes.decoding[lanes]]
            sequences = self.lanes.sequences_of(lanes)
        else:
            sequences = self.lanes.decode_rows()[1]
        plan = draft.plan(DecodeRows(sequences, lanes, self.lanes.positions[lanes]))
        self._advance_decodes(lanes)
        for chunk in plan.chunks:
            self._advance_chunk(chunk)
        return plan if plan.num_rows else None

    def record_decodes(self) -> None:
        """Puts into the prefix cache the blocks that decoding sequences have filled with tokens that were read."""
        if not self._cache.policy.enabled:
            return
        lanes, _ = self.lanes.decode_rows()
        due = lanes[self.lanes.positions[lanes] >= self.lanes.record_at[lanes]]
        for sequence in self.lanes.sequences_of(due):
            settled = self._settled(sequence)
            if settled >= self.lanes.record_at[sequence.lane]:
                self._record(sequence, settled, {settled - settled % self._block_size: JoinKind.RUNNING})

    def promised(self) -> list[int]:
        """Blocks by group that running sequences will still take."""
        busy = [lane for lane, sequence in enumerate(self.lanes.sequences) if sequence is not None]
        prefilling = [(sequence.lane, sequence.num_tokens) for sequence in self.prefilling]
        positions = np.maximum(self.lanes.positions[busy], self.lanes.prompt_lens[busy])
        return self._cache.room.promised(prefilling, positions, self.lanes.limits[busy])

    def retire_ending(self) -> None:
        """Frees those whose last token the step in flight draws: the device runs that step before any that follows."""
        for sequence in self._ending:
            if sequence.state is SequenceState.RUNNING:
                self.release(sequence)
                sequence.state = SequenceState.ENDING
        self._ending.clear()

    def release(self, sequence: Sequence) -> None:
        """Takes the lane of a sequence, if it has one; its blocks can be found again."""
        if sequence.lane == NO_LANE:
            return
        settled, prefill = self._settled(sequence), sequence.prefill
        lane = self.lanes.close(sequence)
        if self._cache.policy.enabled:
            prefill.extend(sequence, settled)
            self._cache.close(lane, prefill.chain, settled)
        else:
            self._cache.close(lane)
        self._end_prefill(sequence)

    def lose_all(self) -> None:
        """Takes every lane: all K/V is lost, and steps in flight with it."""
        for sequence in self.lanes.running():
            self._cache.close(self.lanes.close(sequence))
            self._end_prefill(sequence)
        self._ending.clear()

    def check_invariants(self) -> None:
        """Asserts S1, and S2 and S4 of those that run."""
        for sequence in self.lanes.running():
            assert sequence.state is SequenceState.RUNNING, "S2: a lane of one who does not run"
            assert self.lanes.sequences[sequence.lane] is sequence, "S2: a lane with two owners"
            assert 0 <= self.lanes.positions[sequence.lane] <= sequence.max_total_tokens - 1, "S1"
        assert all(sequence.state is SequenceState.RUNNING for sequence in self.prefilling), "S2"
        assert self.prefilling == sorted(self.prefilling, key=_age), "S4: a younger sequence is served first"

    def _start(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.RUNNING
        bisect.insort(self.prefilling, sequence, key=_age)

    def _victim(self, needy: Sequence) -> Sequence | None:
        """Of the sequences younger than ``needy``, the one whose preemption loses least work."""
        younger = [other for other in self.lanes.running() if other.age > needy.age]
        if not younger:
            return None

        def lost_work(other: Sequence) -> tuple[int, tuple[int, int]]:
            cached = 0 if other.prefix is None else other.prefix.start
            return int(self.lanes.positions[other.lane]) - cached, (-other.age[0], -other.age[1])

        return min(younger, key=lost_work)

    def _preempt(self, sequence: Sequence, draft: Draft) -> None:
        """Back to the queue; a token that is drawn but not read comes first, then all is computed again."""
        sequence.in_flight = max(0, int(self.lanes.positions[sequence.lane]) + 1 - sequence.num_tokens)
        self.num_preemptions += 1
        draft.withdraw(sequence.lane)
        self.release(sequence)
        self._waiting.add(sequence)

    def _advance_decodes(self, lanes: NDArray[np.int32]) -> None:
        self.lanes.positions[lanes] += 1
        at_end = lanes[self.lanes.positions[lanes] >= self.lanes.limits[lanes]]
        for sequence in self.lanes.sequences_of(at_end):
            self._note_ending(sequence)

    def _advance_chunk(self, chunk: Chunk) -> None:
        sequence, lane = chunk.sequence, chunk.sequence.lane
        self.lanes.positions[lane] = chunk.end
        if self._cache.policy.enabled:
            checkpoints = sequence.prefill.checkpoints
            joins = {position: kind for position, kind in checkpoints.items() if chunk.start < position <= chunk.end}
            self._record(sequence, chunk.end, joins)
            self._waiting.note_progress(sequence, chunk.end)
        if chunk.samples:
            self._end_prefill(sequence)
            self.lanes.set_decoding(lane, True)
            if chunk.end >= self.lanes.limits[lane]:
                self._note_ending(sequence)

    def _note_ending(self, sequence: Sequence) -> None:
        """Its last token is on its way; it keeps its lane until this plan is built."""
        self.lanes.set_decoding(sequence.lane, False)
        self._ending.append(sequence)

    def _end_prefill(self, sequence: Sequence) -> None:
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
            self._waiting.note_end(sequence)

    def _settled(self, sequence: Sequence) -> int:
        """Tokens of a running sequence that are known and whose K/V some planned step writes."""
        return min(int(self.lanes.positions[sequence.lane]), sequence.num_tokens)

    def _record(self, sequence: Sequence, num_tokens: int, joins: dict[int, JoinKind]) -> None:
        """Puts the full blocks of the first ``num_tokens`` tokens into the prefix cache; later plans may use them."""
        sequence.prefill.extend(sequence, num_tokens)
        self._cache.record(sequence.lane, sequence.prefill.chain, num_tokens, joins)
        self.lanes.record_at[sequence.lane] = num_tokens - num_tokens % self._block_size + self._block_size
