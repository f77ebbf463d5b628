"""Who is admitted next: the queue, in an order that looks at the prefix cache.

Owns: the waiting sequences, what is cached of each, and who waits for a prefix that is being computed. Must never: open
lanes, or take blocks.

Sequences most of whose prompt is cached go first, so that what is cached is used before it is evicted. Nobody is passed
over for long: past ``max_bypass_seconds`` of waiting a sequence goes before all that came later, cached ones among the
aged first; past twice that, order is strictly by age. A match is revised when something it rests on changes, a few a
step, so that a step costs the same however many wait.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

from hkv_jax.engine.prefill import Prefill
from hkv_jax.engine.request import Sequence, SequenceState
from hkv_jax.engine.scheduler_config import SchedulerConfig
from hkv_jax.engine.waiting_queue import WaitingQueue
from hkv_jax.kvcache.join_point import JoinKind, JoinPoint
from hkv_jax.kvcache.prefix_cache import PrefixCache
from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.kvcache.prefix_tree import Node
from hkv_jax.outputs import PrefixHit

RESIDENT_SHARE = 0.3
"""A sequence at least so much of which is cached goes before others."""

REVISIONS_A_STEP = 8
"""Matches brought up to date each time the next sequence is asked for, beside those of the sequences looked at."""

SEQUENCES_LOOKED_AT = 16
"""Sequences looked through for one that fits beside the first, and those a step may find to wait for a prefix."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Watch:
    """What a waiting sequence's ``use`` rests on.

    ``digest`` is that of the first block that is not cached, ``nodes`` are those whose loss or join point changes the
    match, ``join`` is the join point it would start from.
    """

    use: PrefixUse
    digest: bytes | None
    nodes: tuple[Node, ...]
    join: JoinPoint | None


class Admission:
    """The waiting sequences; each is in exactly one of three places: resident, others, or parked behind a prefill.

    ``num_prefix_waits`` counts how often one was parked.
    """

    def __init__(self, config: SchedulerConfig, prefixes: PrefixCache, clock: Callable[[], float]) -> None:
        """Nobody waits; the two seconds of ``config`` are in those of ``clock``."""
        self.num_prefix_waits = 0
        self._prefixes = prefixes
        self._clock = clock
        self._max_bypass_seconds = config.max_bypass_seconds
        self._max_prefix_wait_seconds = config.max_prefix_wait_seconds
        self._resident = WaitingQueue()
        self._others = WaitingQueue()
        self._parked: dict[Sequence, float] = {}  # until when at most
        self._deadlines: collections.deque[tuple[float, Sequence]] = collections.deque()
        self._planned: dict[bytes, Sequence] = {}  # digests of prompts that are being computed
        self._awaited: dict[bytes, dict[Sequence, None]] = {}  # by the first digest that is not cached
        self._watchers: dict[Node, dict[Sequence, None]] = {}  # by what their matches rest on
        self._watches: dict[Sequence, _Watch] = {}
        self._dirty: dict[Sequence, None] = {}  # whose matches may be out of date, first changed first
        prefixes.tree.on_insert = self._on_insert
        prefixes.tree.on_change = self._on_change

    def __len__(self) -> int:
        return len(self._resident) + len(self._others) + len(self._parked)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._resident
        yield from self._others
        yield from self._parked

    def add(self, sequence: Sequence) -> None:
        """A sequence waits from now on."""
        sequence.state = SequenceState.WAITING
        if self._prefixes.policy.enabled:
            sequence.prefill = Prefill.of(sequence, sequence.prefill_end, self._prefixes.block_size)
        sequence.prefill.queued_at = self._clock()
        self._place(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence waits no more."""
        self._leave(sequence)
        self._forget(sequence)

    def next(self) -> tuple[Sequence, PrefixUse] | None:
        """The sequence to be admitted next, which stays in the queue, and how its prefix would be used now."""
        now = self._prefixes.now
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, sequence = self._deadlines.popleft()
            if self._parked.get(sequence) == deadline:
                self._unpark(sequence)
        for sequence in list(itertools.islice(self._dirty, REVISIONS_A_STEP)):
            if sequence in self._dirty:
                self._leave(sequence)
                self._place(sequence)
        num_parked = 0
        # Who is parked waits for somebody who runs, so that the rest may be looked at in a later step.
        while num_parked < SEQUENCES_LOOKED_AT and (first := self._first(now)) is not None:
            use = self._current(first)
            leader = self._leader_of(first)
            if leader is not None:
                self._leave(first)
                self._park(first, *leader)
                num_parked += 1
                continue
            queue = self._queue_for(first, use)
            if first in queue:
                return first, use
            self._leave(first)
            queue.insert(first)
        return None

    def next_beside(self, head: Sequence) -> tuple[Sequence, PrefixUse] | None:
        """The oldest sequence whose cached prefix runs right now, while there is no room for ``head``."""
        if self._prefixes.now - head.prefill.queued_at > self._max_bypass_seconds:
            return None
        for sequence in itertools.islice(self._resident, SEQUENCES_LOOKED_AT):
            if sequence is not head and self._prefixes.is_running(sequence.prefill.path):
                return sequence, self._current(sequence)
        return None

    def revise(self, sequence: Sequence) -> PrefixUse:
        """How the prefix of a waiting sequence can be used at this very moment; what it rests on is watched anew."""
        self._forget(sequence)
        path = sequence.prefill.path
        use = self._prefixes.choose(path)
        if sequence.wants_prompt_logprobs:
            # They need every position's output, not just its K/V.
            use = PrefixUse(0, use.matched, PrefixHit.MISS, 0)
        nodes = path.nodes[-1:]
        if use.loads_tail and use.start < use.matched:
            nodes.append(path.node_at(use.start))
        watch = _Watch(use, path.next_digest, tuple(nodes), self._prefixes.join_of(path, use))
        if watch.digest is not None:
            self._awaited.setdefault(watch.digest, {})[sequence] = None
        for node in watch.nodes:
            self._watchers.setdefault(node, {})[sequence] = None
        if watch.join is not None:
            self._prefixes.await_join(watch.join, 1)
        self._watches[sequence] = watch
        return use

    def note_prefill(self, sequence: Sequence, use: PrefixUse) -> None:
        """An admitted sequence is going to compute its known tokens."""
        prefill = sequence.prefill
        for digest in prefill.chain.digests[use.matched // prefill.chain.block_size : prefill.path.limit]:
            self._planned.setdefault(digest, sequence)

    def note_progress(self, sequence: Sequence, position: int) -> None:
        """A prefill has recorded its tokens up to ``position``."""
        followers = sequence.prefill.followers
        ready = [follower for wanted, follower in followers if wanted <= position]
        if ready:
            sequence.prefill.followers = [entry for entry in followers if entry[0] > position]
            for follower in ready:
                if follower in self._parked:
                    self._unpark(follower)

    def note_end(self, sequence: Sequence) -> None:
        """A sequence has computed what it knew, or runs no more."""
        prefill = sequence.prefill
        for digest in prefill.chain.digests:
            if self._planned.get(digest) is sequence:
                del self._planned[digest]
        for _, follower in prefill.followers:
            if follower in self._parked:
                self._unpark(follower)
        prefill.followers = []

    def _first(self, now: float) -> Sequence | None:
        resident, other = self._resident.head, self._others.head
        if resident is None or other is None:
            return resident or other
        waited = now - resident.prefill.queued_at, now - other.prefill.queued_at
        limit = self._max_bypass_seconds
        if max(waited) > 2 * limit:
            return resident if resident.age < other.age else other
        return other if waited[0] <= limit < waited[1] else resident

    def _queue_for(self, sequence: Sequence, use: PrefixUse) -> WaitingQueue:
        return self._resident if use.start >= RESIDENT_SHARE * sequence.num_tokens else self._others

    def _place(self, sequence: Sequence) -> None:
        self._queue_for(sequence, self.revise(sequence)).insert(sequence)

    def _leave(self, sequence: Sequence) -> None:
        if self._parked.pop(sequence, None) is None:
            (self._resident if sequence in self._resident else self._others).remove(sequence)

    def _current(self, sequence: Sequence) -> PrefixUse:
        """The match as it is, revised only where something it rests on may have changed."""
        if sequence not in self._dirty:
            use = self._watches[sequence].use
            if self._prefixes.rests_on_joins(sequence.prefill.path, use):
                return use
        return self.revise(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._dirty.pop(sequence, None)
        watch = self._watches.pop(sequence, None)
        if watch is None:
            return
        if watch.join is not None:
            self._prefixes.await_join(watch.join, -1)
        if watch.digest is not None and (waiting := self._awaited.get(watch.digest)) is not None:
            waiting.pop(sequence, None)
            if not waiting:
                del self._awaited[watch.digest]
        for node in watch.nodes:
            if (watchers := self._watchers.get(node)) is not None:
                watchers.pop(sequence, None)
                if not watchers:
                    del self._watchers[node]

    def _on_insert(self, digest: bytes) -> None:
        self._mark(self._awaited.pop(digest, {}))

    def _on_change(self, node: Node) -> None:
        self._mark(self._watchers.pop(node, {}))

    def _mark(self, sequences: Iterable[Sequence]) -> None:
        """Their matches may be out of date; those of parked ones are looked up anew anyway when they are let go."""
        self._dirty.update((sequence, None) for sequence in sequences if sequence not in self._parked)

    def _leader_of(self, sequence: Sequence) -> tuple[Sequence, int] | None:
        """Who computes more of this sequence's prefix right now, and up to where they agree; its match is current."""
        prefill = sequence.prefill
        digest = prefill.path.next_digest
        if digest is None or prefill.waited_for_prefix or not self._max_prefix_wait_seconds:
            return None
        leader = self._planned.get(digest)
        if leader is None:
            return None
        size = prefill.chain.block_size
        place = prefill.path.matched // size
        digests, limit = prefill.chain.digests, prefill.path.limit
        while place < limit and self._planned.get(digests[place]) is leader:
            place += 1
        return leader, place * size

    def _park(self, sequence: Sequence, leader: Sequence, position: int) -> None:
        deadline = self._prefixes.now + self._max_prefix_wait_seconds
        self._parked[sequence] = deadline
        self._deadlines.append((deadline, sequence))
        leader.prefill.followers.append((position, sequence))
        leader.prefill.checkpoints.setdefault(position, JoinKind.BRANCH)
        self.num_prefix_waits += 1

    def _unpark(self, sequence: Sequence) -> None:
        del self._parked[sequence]
        if sequence.prefill.queued_at + self._max_prefix_wait_seconds <= self._prefixes.now:
            sequence.prefill.waited_for_prefix = True
        # Whose leader got on has most of its prompt cached. Hundreds may follow one: they are matched as they come up.
        self._resident.insert(sequence)
        self._dirty[sequence] = None
