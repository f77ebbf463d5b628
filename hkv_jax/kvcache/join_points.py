"""Places where a later request can join a cached prefix, and what each is worth.

Owns: join points, what evicting one would free and cost, and the order of eviction. Must never: allocate blocks, or
know tables; a block that a table holds is simply not freed.

A join point at p is the tail of sliding blocks before p together with the global blocks that only it needs. Sliding
blocks of no join point, and global blocks before none, are worth nothing and are free to be taken.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
import itertools
from typing import Protocol

from hkv_jax.kvcache.group_cache import GroupCache
from hkv_jax.kvcache.prefix_tree import Node, PrefixTree


class JoinKind(enum.Enum):
    """Why a join point exists.

    PROMPT_END: the last full block of a prompt that leaves a token to compute. BEFORE_END: blocks just before it, since
    a question may cross into the document's last block. BRANCH: prompts were seen to differ from here on. TURN: the end
    of what a finished or preempted sequence computed. RUNNING: the last full block of a running one. REST: global
    blocks without a tail, from which a rebuild still saves work.
    """

    PROMPT_END = "prompt_end"
    BEFORE_END = "before_end"
    BRANCH = "branch"
    TURN = "turn"
    RUNNING = "running"
    REST = "rest"


class JoinPoint:
    """A tail before ``node.end``: ``blocks`` of each sliding group (none in a REST).

    ``last_use`` is in seconds of the cache's clock; ``num_hits`` requests started here.
    """

    __slots__ = ("alive", "blocks", "kind", "last_use", "node", "num_hits", "version")

    def __init__(self, node: Node, kind: JoinKind, blocks: list[list[int]], now: float) -> None:
        self.node = node
        self.kind = kind
        self.blocks = blocks
        self.last_use = now
        self.num_hits = 0
        self.version = 0
        self.alive = True


@dataclasses.dataclass(frozen=True, slots=True)
class Stake:
    """What evicting a join point would do: ``num_tokens`` of work lost if it is used again, ``num_bytes`` freed.

    A block that several join points keep counts for each of them in part: none alone would free it, all together do.
    """

    num_tokens: float
    num_bytes: float


class EvictionOrder(Protocol):
    """Which join point goes first: the one with the smallest key. A key must not change while nothing happens to it."""

    def key(self, join: JoinPoint, stake: Stake) -> float:
        """Its place in the order."""
        ...

    def note_match(self, kind: JoinKind, gone: bool) -> None:
        """A request could use a join point of this kind; ``gone``: one that was evicted before."""
        ...

    def note_created(self, kind: JoinKind) -> None:
        """A join point was made."""
        ...


class JoinPoints:
    """All join points of a tree, ordered by worth.

    Invariant J1: a sliding block is kept once for each living join point that lists it, and each of those is its node's
    ``join``.
    """

    def __init__(
        self, tree: PrefixTree, groups: list[GroupCache], order: EvictionOrder, rebuild_tokens: int | None
    ) -> None:
        """``rebuild_tokens`` is R, or ``None`` where tails are never rebuilt."""
        self.num_evicted = 0
        self.released = False  # blocks have left tables since nothing could be evicted
        self._tree, self._groups, self._order = tree, groups, order
        self._rebuild_tokens = rebuild_tokens
        self._heap: list[tuple[float, int, int, JoinPoint]] = []
        self._ticket = itertools.count()
        self._block_bytes = [group.layout.format.block_bytes for group in groups]
        self._node_bytes = sum(
            self._block_bytes[g] * (tree.block_size // groups[g].block_size) for g in tree.globals
        )
        self.living: set[JoinPoint] = set()

    def create(self, node: Node, kind: JoinKind, now: float) -> JoinPoint | None:
        """A join point at ``node``, or the one there is, as ``kind``; ``None`` where the tail is not whole."""
        join = node.join
        if join is not None and join.kind is not JoinKind.REST:
            join.last_use = now
            if kind is not join.kind and _RANK[kind] > _RANK[join.kind]:
                join.kind = kind
            self.push(join)
            return join
        tail = self._tree.tail(node)
        if tail is None:
            return None
        if join is not None:
            self._bury(join)
        return self._add(JoinPoint(node, kind, tail, now))

    def leave_rest(self, node: Node, now: float) -> JoinPoint | None:
        """A REST at a node that nothing needs, where a rebuild from its end would save work."""
        rest = JoinPoint(node, JoinKind.REST, [], now)
        _, lower, _ = self._span(rest)
        if self._rebuild_tokens is None or node.end - lower <= self._rebuild_tokens:
            return None
        return self._add(rest)

    def use(self, join: JoinPoint, now: float) -> None:
        """A request starts at ``join``."""
        join.num_hits += 1
        join.last_use = now
        if join.kind is JoinKind.RUNNING:
            join.kind = JoinKind.TURN
        self._order.note_match(join.kind, gone=False)
        self.push(join)

    def remove(self, join: JoinPoint) -> None:
        """Gives a join point up, whatever it is worth."""
        if join.alive:
            self._bury(join)

    def push(self, join: JoinPoint) -> None:
        """Notes that what ``join`` is worth may have changed, or that its blocks may have come free."""
        join.version += 1
        key = self._order.key(join, self.stake(join))
        heapq.heappush(self._heap, (key, next(self._ticket), join.version, join))
        if len(self._heap) > 4 * len(self.living) + 64:
            self._heap = [entry for entry in self._heap if entry[3].alive and entry[2] == entry[3].version]
            heapq.heapify(self._heap)

    def stake(self, join: JoinPoint) -> Stake:
        """What evicting ``join`` alone would free, and the work it saves whoever joins here."""
        num_bytes = 0.0
        for group, blocks in zip(self._tree.sliding, join.blocks, strict=False):
            pool = self._groups[group].pool
            size = self._block_bytes[group]
            for block in blocks:
                if not pool.references(block):
                    num_bytes += size / pool.keeps(block)
        node, lower, sole = self._span(join)
        span = node.end - lower
        rebuild = self._rebuild_tokens
        if self._is_rest(join):
            assert rebuild is not None
            saved = self._tree.block_size * max(0.0, 1 - rebuild / span)
            return Stake(saved, self._node_bytes if sole else 0)
        if rebuild is not None and span > rebuild:
            return Stake(rebuild, num_bytes)
        return Stake(span, num_bytes + sole * self._node_bytes)

    def evict(self) -> bool:
        """Evicts the join point worth least of those that free anything; False where there is none."""
        if self._evict_first():
            return True
        if not self.released:
            return False
        # Blocks of a join point can come free when a sequence ends that never knew of it: look at all once more.
        self.released = False
        for join in self.living:
            self.push(join)
        return self._evict_first()

    def _evict_first(self) -> bool:
        while self._heap:
            key, _, version, join = heapq.heappop(self._heap)
            if not join.alive or version != join.version:
                continue
            stake = self.stake(join)
            if not stake.num_bytes:
                join.version += 1  # it comes back when its blocks are released
                continue
            current = self._order.key(join, stake)
            if current > key + 1e-9 and self._heap and current > self._heap[0][0]:
                heapq.heappush(self._heap, (current, next(self._ticket), join.version, join))
                continue
            self._evict(join)
            return True
        return False

    def check_invariants(self) -> None:
        """Asserts J1."""
        counts: list[dict[int, int]] = [{} for _ in self._groups]
        for join in self.living:
            assert join.alive and join.node.alive and join.node.join is join, "J1: a join point that is not its node's"
            for group, blocks in zip(self._tree.sliding, join.blocks, strict=False):
                for block in blocks:
                    counts[group][block] = counts[group].get(block, 0) + 1
        for group in self._tree.sliding:
            pool = self._groups[group].pool
            kept = {block: pool.keeps(block) for block in range(pool.num_ids) if pool.keeps(block)}
            assert kept == counts[group], "J1: sliding blocks are kept more or less often than they are listed"

    def _is_rest(self, join: JoinPoint) -> bool:
        """Whether the prefix stays useful when its last block goes: nothing of it is a tail."""
        return join.kind is JoinKind.REST or not self._tree.sliding

    def _span(self, join: JoinPoint) -> tuple[Node, int, int]:
        """The node, where the next lower join point with a tail lies, and how many nodes only this one needs."""
        node: Node = join.node
        sole, exclusive = 0, node.need == 1 and self._tree.is_idle(node)
        at = node
        while True:
            if exclusive:
                sole += 1
            parent = at.parent
            if parent is None or not parent.blocks:
                return node, 0, sole
            at = parent
            if at.join is not None and at.join.kind is not JoinKind.REST:
                return node, at.end, sole
            exclusive = exclusive and at.need == 1

    def _evict(self, join: JoinPoint) -> None:
        self.num_evicted += 1
        node, lower, _ = self._span(join)
        rebuild = self._rebuild_tokens
        if self._is_rest(join):
            parent = node.parent
            self._bury(join)
            assert parent is not None and rebuild is not None
            if parent.blocks and parent.end - lower > rebuild and parent.join is None and not parent.need:
                rest = JoinPoint(parent, JoinKind.REST, [], join.last_use)
                rest.num_hits = join.num_hits
                self._add(rest)
            return
        leaves_rest = rebuild is not None and node.end - lower > rebuild and not any(
            child.need for child in node.children.values()
        )
        self._bury(join)
        if leaves_rest:
            rest = JoinPoint(node, JoinKind.REST, [], join.last_use)
            rest.num_hits = join.num_hits
            self._add(rest)
        below = self._at(node, lower)
        if below is not None:
            self.push(below)

    def _at(self, node: Node, end: int) -> JoinPoint | None:
        at: Node | None = node
        while at is not None and at.end > end:
            at = at.parent
        return None if at is None else at.join

    def _add(self, join: JoinPoint) -> JoinPoint:
        for group, blocks in zip(self._tree.sliding, join.blocks, strict=False):
            self._groups[group].pool.keep(blocks)
        join.node.join = join
        self._tree.need(join.node)
        self._tree.on_change(join.node)
        self.living.add(join)
        self._order.note_created(join.kind)
        self.push(join)
        return join

    def _bury(self, join: JoinPoint) -> None:
        join.alive = False
        join.node.join = None
        self.living.discard(join)
        for group, blocks in zip(self._tree.sliding, join.blocks, strict=False):
            self._groups[group].pool.unkeep(blocks)
        self._tree.release(join.node)
        self._tree.on_change(join.node)


_RANK = {kind: rank for rank, kind in enumerate(
    (JoinKind.REST, JoinKind.RUNNING, JoinKind.BEFORE_END, JoinKind.PROMPT_END, JoinKind.TURN, JoinKind.BRANCH)
)}
