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
from collections.abc import Iterable, Mapping
from typing import Protocol

from hkv_jax.kvcache.group_cache import GroupCache
from hkv_jax.kvcache.prefix_tree import Node, PrefixTree


MAX_GHOSTS = 4096
"""Evicted join points that are remembered, to learn how many would have been used."""


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

    ``last_use`` is in seconds of the cache's clock; ``num_hits`` requests started here, ``num_waiting`` wait to. ``origin`` is what a REST was before. ``lower_end`` is where the next
    lower join point with a tail lay when this one was made: a REST's worth need not follow every change below it.
    """

    __slots__ = ("alive", "blocks", "kind", "last_use", "lower_end", "node", "num_hits", "num_waiting", "origin", "version")

    def __init__(self, node: Node, kind: JoinKind, blocks: list[list[int]], now: float) -> None:
        self.node = node
        self.kind = kind
        self.origin = JoinKind.TURN if kind is JoinKind.REST else kind
        self.blocks = blocks
        self.last_use = now
        self.num_hits = 0
        self.num_waiting = 0
        self.lower_end = 0
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

    def chance(self, kind: JoinKind, num_uses: int) -> float:
        """That a join point of this kind, used so often, is used again."""
        ...

    def note_made(self, kind: JoinKind, num_uses: int) -> None:
        """A join point came to have been used so often."""
        ...

    def note_used(self, kind: JoinKind, num_uses: int) -> None:
        """One that had been used so often was used, or would have been, had it not been evicted."""
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
        self._ghosts: dict[bytes, tuple[JoinKind, int]] = {}

    def create(self, node: Node, kind: JoinKind, now: float) -> JoinPoint | None:
        """A join point at ``node``, or the one there is, as ``kind``; ``None`` where the tail is not whole."""
        join = node.join
        if join is not None and join.kind is not JoinKind.REST:
            join.last_use = now
            if _RANK[kind] > _RANK[join.kind]:
                join.kind = join.origin = kind
                self._order.note_made(kind, join.num_hits)
            self.push(join)
            return join
        tail = self._tree.tail(node)
        return None if tail is None else self._add(JoinPoint(node, kind, tail, now), join)

    def leave_rest(self, node: Node, now: float) -> JoinPoint | None:
        """A REST at a node that nothing needs, where a rebuild from its end would save work."""
        rest = JoinPoint(node, JoinKind.REST, [], now)
        lower, _ = self._span(rest)
        rest.lower_end = lower.end
        if self._rebuild_tokens is None or node.end - lower.end <= self._rebuild_tokens:
            return None
        return self._add(rest)

    def use(self, join: JoinPoint, now: float) -> None:
        """A request starts at ``join``."""
        if join.kind is JoinKind.RUNNING:
            join.kind = join.origin = JoinKind.TURN
            self._order.note_made(JoinKind.TURN, 0)
        self._order.note_used(join.origin, join.num_hits)
        join.num_hits += 1
        self._order.note_made(join.origin, join.num_hits)
        join.last_use = now
        self.push(join)

    def look_for_ghosts(self, digests: Iterable[bytes]) -> None:
        """Learns from the first of ``digests`` at which an evicted join point would have served."""
        ghosts = self._ghosts
        for digest in digests:
            if digest in ghosts:
                self._order.note_used(*ghosts.pop(digest))
                return

    def remove(self, join: JoinPoint) -> None:
        """Gives a join point up, whatever it is worth."""
        if join.alive:
            self._bury(join)

    def rename(self, group: int, moved: Mapping[int, int]) -> None:
        """Blocks of a sliding group have new ids, by their old ones."""
        place = self._tree.sliding.index(group)
        for join in self.living:
            if join.blocks:
                join.blocks[place] = [moved.get(block, block) for block in join.blocks[place]]

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
        rebuild, node = self._rebuild_tokens, join.node
        if self._is_rest(join):
            assert rebuild is not None
            saved = self._tree.block_size * max(0.0, 1 - rebuild / (node.end - join.lower_end))
            freed = node.need == 1 and self._tree.is_idle(node)
            return Stake(saved, num_bytes + freed * self._node_bytes)
        lower, sole = self._span(join)
        span = node.end - lower.end
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

    def _span(self, join: JoinPoint) -> tuple[Node, int]:
        """Where the next lower join point with a tail lies (or the root), and how many nodes only this one needs."""
        at = join.node
        sole, exclusive = 0, at.need == 1 and self._tree.is_idle(at)
        while True:
            sole += exclusive
            parent = at.parent
            assert parent is not None
            at = parent
            if not at.blocks or (at.join is not None and at.join.kind is not JoinKind.REST):
                return at, sole
            exclusive = exclusive and at.need == 1 and self._tree.is_idle(at)

    def _evict(self, join: JoinPoint) -> None:
        """Gives a join point up; global blocks from which a rebuild would still save work stay as a REST."""
        self.num_evicted += 1
        if join.kind is not JoinKind.REST:
            self._ghosts.pop(join.node.digest, None)
            self._ghosts[join.node.digest] = join.origin, join.num_hits
            if len(self._ghosts) > MAX_GHOSTS:
                del self._ghosts[next(iter(self._ghosts))]
        node, rebuild = join.node, self._rebuild_tokens
        at = node.parent if self._is_rest(join) else node
        if self._is_rest(join):
            lower_end, below = join.lower_end, None
        else:
            lower, _ = self._span(join)
            lower_end, below = lower.end, lower.join
        assert at is not None
        leaves_rest = rebuild is not None and at.blocks and at.need == 1 and at.end - lower_end > rebuild
        if leaves_rest and (at is node or at.join is None):
            rest = JoinPoint(at, JoinKind.REST, [], join.last_use)
            rest.num_hits, rest.lower_end, rest.origin = join.num_hits, lower_end, join.origin
            self._add(rest, join)
        else:
            self._bury(join)
            self._push_needed(node)
        if below is not None:
            # Whoever would have joined here will now join below.
            below.last_use = max(below.last_use, join.last_use)
            chance = self._order.chance
            if chance(join.origin, join.num_hits) > chance(below.origin, below.num_hits):
                below.origin, below.num_hits = join.origin, join.num_hits
            self.push(below)

    def _push_needed(self, node: Node) -> None:
        """The nearest node at or before ``node`` that is still needed: its join point alone may need it now."""
        at: Node | None = node
        while at is not None and at.blocks and not at.need:
            at = at.parent
        if at is not None and at.join is not None:
            self.push(at.join)

    def _add(self, join: JoinPoint, instead_of: JoinPoint | None = None) -> JoinPoint:
        """Makes a join point, and gives up another only when what both need is needed by the new one."""
        for group, blocks in zip(self._tree.sliding, join.blocks, strict=False):
            self._groups[group].pool.keep(blocks)
        self._tree.need(join.node)
        if instead_of is not None:
            self._bury(instead_of)
        join.node.join = join
        self._tree.on_change(join.node)
        self.living.add(join)
        if join.kind not in (JoinKind.REST, JoinKind.RUNNING):
            self._order.note_made(join.kind, 0)
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
