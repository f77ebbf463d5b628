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
import itertools
from collections.abc import Iterator

from hkv_jax.engine.request import Sequence
from hkv_jax.engine.waiting_queue import WaitingQueue
from hkv_jax.kvcache.join_point import JoinKind
from hkv_jax.kvcache.prefix_cache import PrefixCache
from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.kvcache.prefix_tree import Node
from hkv_jax.outputs import PrefixHit

RESIDENT_SHARE = 0.5
"""A sequence at least so much of which is cached goes before others."""

REVISIONS_A_STEP = 8

SEQUENCES_LOOKED_AT = 16
"""Resident sequences looked through for one that fits beside the first."""


class Admission:
    """The waiting sequences; each is in exactly one of three places: resident, others, or parked behind a prefill."""

    def __init__(self, prefixes: PrefixCache, max_bypass_seconds: float, max_prefix_wait_seconds: float) -> None:
        self.num_prefix_waits = 0
        self._prefixes = prefixes
        self._max_bypass_seconds = max_bypass_seconds
        self._max_prefix_wait_seconds = max_prefix_wait_seconds
        self._resident = WaitingQueue()
        self._others = WaitingQueue()
        self._parked: dict[Sequence, float] = {}
        self._deadlines: collections.deque[tuple[float, Sequence]] = collections.deque()
        self._planned: dict[bytes, Sequence] = {}  # digests of prompts that are being computed
        self._awaited: dict[bytes, set[Sequence]] = {}  # first digest that is not cached
        self._watchers: dict[Node, set[Sequence]] = {}  # nodes a match rests on
        self._watched: dict[Sequence, tuple[bytes | None, list[Node], PrefixUse]] = {}
        self._dirty: dict[Sequence, None] = {}
        prefixes.tree.on_insert = self._on_insert
        prefixes.tree.on_change = self._on_change

    def __len__(self) -> int:
        return len(self._resident) + len(self._others) + len(self._parked)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._resident
        yield from self._others
        yield from self._parked

    def add(self, sequence: Sequence) -> None:
        """A sequence waits from now on; its path may be out of date."""
        self._place(sequence, self._revise(sequence))

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
        for sequence in list(self._dirty)[:REVISIONS_A_STEP]:
            if sequence in self._dirty and sequence not in self._parked:
                self._leave(sequence)
                self._place(sequence, self._revise(sequence))
        while (sequence := self._first(now)) is not None:
            use = self._current(sequence)
            leader, position = self._leader_of(sequence, use)
            if leader is not None:
                self._leave(sequence)
                self._park(sequence, leader, position)
                continue
            queue = self._queue_for(sequence, use)
            if sequence in queue:
                return sequence, use
            self._leave(sequence)
            queue.insert(sequence)
        return None

    def next_beside(self, head: Sequence) -> tuple[Sequence, PrefixUse] | None:
        """The oldest sequence whose cached prefix runs right now, while there is no room for ``head``."""
        if self._prefixes.now - head.prefill.queued_at > self._max_bypass_seconds:
            return None
        for sequence in itertools.islice(self._resident, SEQUENCES_LOOKED_AT):
            if sequence is not head and self._prefixes.is_running(sequence.prefill.path):
                return sequence, self._current(sequence)
        return None

    def revised(self, sequence: Sequence) -> PrefixUse:
        """How the prefix of a waiting sequence can be used at this very moment."""
        return self._revise(sequence)

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

    def _place(self, sequence: Sequence, use: PrefixUse) -> None:
        self._queue_for(sequence, use).insert(sequence)

    def _leave(self, sequence: Sequence) -> None:
        if self._parked.pop(sequence, None) is None:
            (self._resident if sequence in self._resident else self._others).remove(sequence)

    def _revise(self, sequence: Sequence) -> PrefixUse:
        """Brings the match up to date and watches what it rests on."""
        self._forget(sequence)
        path = sequence.prefill.path
        use = self._prefixes.choose(path)
        if sequence.wants_prompt_logprobs:
            use = PrefixUse(0, use.matched, PrefixHit.MISS, 0)
        digest = path.next_digest
        if digest is not None:
            self._awaited.setdefault(digest, set()).add(sequence)
        nodes = path.nodes[-1:]
        if use.start and not use.context_start and use.start < use.matched:
            nodes.append(next(node for node in reversed(path.nodes) if node.end == use.start))
        for node in nodes:
            self._watchers.setdefault(node, set()).add(sequence)
        join = self._prefixes.join_of(path, use)
        if join is not None:
            self._prefixes.await_join(join, 1)
        self._watched[sequence] = digest, nodes, use, join
        return use

    def _current(self, sequence: Sequence) -> PrefixUse:
        """The match as it is, revised only where something it rests on may have changed."""
        if sequence not in self._dirty:
            use = self._watched[sequence][2]
            if self._prefixes.rests_on_joins(sequence.prefill.path, use):
                return use
        return self._revise(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._dirty.pop(sequence, None)
        digest, nodes, _, join = self._watched.pop(sequence, (None, [], None, None))
        if join is not None:
            self._prefixes.await_join(join, -1)
        if digest is not None and (waiting := self._awaited.get(digest)) is not None:
            waiting.discard(sequence)
            if not waiting:
                del self._awaited[digest]
        for node in nodes:
            if (watchers := self._watchers.get(node)) is not None:
                watchers.discard(sequence)
                if not watchers:
                    del self._watchers[node]

    def _on_insert(self, digest: bytes) -> None:
        for sequence in self._awaited.pop(digest, ()):
            self._dirty[sequence] = None

    def _on_change(self, node: Node) -> None:
        for sequence in self._watchers.pop(node, ()):
            self._dirty[sequence] = None

    def _leader_of(self, sequence: Sequence, use: PrefixUse) -> tuple[Sequence | None, int]:
        """Who computes more of this sequence's prefix right now, and up to where they agree."""
        prefill = sequence.prefill
        digest = prefill.path.next_digest
        if digest is None or prefill.waited_for_prefix or not self._max_prefix_wait_seconds:
            return None, 0
        leader = self._planned.get(digest)
        if leader is None:
            return None, 0
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
        self._place(sequence, self._revise(sequence))
