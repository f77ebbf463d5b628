"""Join points: which prefixes are worth keeping, and what goes when memory is short.

Owns: all join points of a tree, what each would free and cost. Must never: allocate blocks, or know tables; a block
that a table holds is simply not freed.

A join point at p is the tail of sliding blocks before p together with the global blocks that only it needs. Sliding
blocks of no join point, and global blocks before none, are worth nothing and are free to be taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hkv_jax.kvcache.eviction_queue import EvictionOrder, EvictionQueue
from hkv_jax.kvcache.group_cache import GroupCache
from hkv_jax.kvcache.join_point import Interest, JoinKind, JoinPoint, Stake
from hkv_jax.kvcache.prefix_tree import Node, PrefixTree

MAX_GHOSTS = 4096
"""Evicted join points that are remembered, to learn how many would have been used."""

_RANK = {
    kind: rank
    for rank, kind in enumerate(
        (JoinKind.REST, JoinKind.RUNNING, JoinKind.BEFORE_END, JoinKind.PROMPT_END, JoinKind.TURN, JoinKind.BRANCH)
    )
}
"""Of two reasons for one join point the higher counts: BRANCH was seen to be of use, others are guesses."""

MAX_UNASKED = 1024
"""Join points valued without anything being evicted, after which valuing waits until something must be."""


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
        self._queue = EvictionQueue(order)
        self._unvalued: dict[JoinPoint, None] = {}
        self._num_unasked = 0  # join points valued since something was evicted
        self._block_bytes = [group.layout.format.block_bytes for group in groups]
        self._node_bytes = sum(self._block_bytes[g] * (tree.block_size // groups[g].block_size) for g in tree.globals)
        self.living: dict[JoinPoint, None] = {}  # in the order they were made
        self._ghosts: dict[bytes, tuple[JoinKind, int]] = {}

    def create(self, node: Node, kind: JoinKind, now: float) -> JoinPoint | None:
        """A join point at ``node``, or the one there is, as ``kind``; ``None`` where the tail is not whole."""
        join = node.join
        if join is not None and join.kind is not JoinKind.REST:
            if _RANK[kind] > _RANK[join.kind]:
                join.kind = join.origin = kind
                self._order.note_made(kind, join.num_hits)
            self.push(join)
            return join
        tail = self._tree.tail(node)
        return None if tail is None else self._add(JoinPoint(node, kind, tail, now), join)

    def leave_rest(self, node: Node, now: float) -> JoinPoint | None:
        """A REST at a node that nothing needs, where a rebuild from its end would save work."""
        lower, _ = self._span(node)
        if self._rebuild_tokens is None or node.end - lower.end <= self._rebuild_tokens:
            return None
        rest = JoinPoint(node, JoinKind.REST, [], now)
        rest.lower_end = lower.end
        return self._add(rest)

    def use(self, node: Node, now: float) -> JoinPoint:
        """A request starts at ``node``, whose tail is whole."""
        join = node.join
        if join is None or join.kind is JoinKind.REST:
            tail = self._tree.tail(node)
            assert tail is not None, "a tail was lost between match and admission"
            found = JoinPoint(node, JoinKind.BRANCH, tail, now)
            found.num_hits = 1
            return self._add(found, join)
        if join.kind is JoinKind.RUNNING:
            join.kind = join.origin = JoinKind.TURN
            self._order.note_made(JoinKind.TURN, 0)
        self._order.note_used(join.origin, join.num_hits)
        join.num_hits += 1
        self._order.note_made(join.origin, join.num_hits)
        left = join.interest.at(now)
        join.interest = Interest(now, 1.0, left.heat + 1.0, max(0.0, left.inherited - 1.0))
        self.push(join)
        return join

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
        """Notes that what ``join`` is worth may have changed, or that its blocks may have come free.

        While memory suffices nobody asks, and it is not valued before somebody does.
        """
        if self._num_unasked < MAX_UNASKED:
            self._num_unasked += 1
            self._queue.push(join, self.stake(join))
        else:
            self._unvalued[join] = None

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
        lower, sole = self._span(node)
        span = node.end - lower.end
        # A window of one token has a tail without blocks: losing that frees nothing.
        if rebuild is not None and span > rebuild and any(join.blocks):
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
        self._num_unasked = 0
        for join in self._unvalued:
            self._queue.push(join, self.stake(join))
        self._unvalued.clear()
        while (popped := self._queue.pop()) is not None:
            join, key = popped
            stake = self.stake(join)
            if not stake.num_bytes:
                continue  # it comes back when its blocks are released
            if self._order.key(join, stake) > key + 1e-9:
                self._queue.push(join, stake)
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

    def _span(self, node: Node) -> tuple[Node, int]:
        """Where the next lower join point with a tail lies (or the root), and how many nodes ``node`` alone needs."""
        at = node
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
            self._remember(join)
        node, rebuild = join.node, self._rebuild_tokens
        if self._is_rest(join):
            # Only the last block goes; the rest is as far above the join point below as it was.
            end, lower_end, heir = node.parent, join.lower_end, None
        else:
            lower, _ = self._span(node)
            end, lower_end, heir = node, lower.end, lower.join
        assert end is not None
        saves = rebuild is not None and end.blocks and end.need == 1 and end.end - lower_end > rebuild
        if saves and (end is node or end.join is None):
            rest = JoinPoint(end, JoinKind.REST, [], 0.0)
            rest.num_hits, rest.lower_end, rest.origin = join.num_hits, lower_end, join.origin
            rest.interest = join.interest
            self._add(rest, join)
        else:
            self._bury(join)
            self._push_needed(node)
        if heir is not None:
            self._bequeath(join, heir)

    def _remember(self, join: JoinPoint) -> None:
        """Keeps in mind that there was a join point, until so many others are gone that it tells nothing any more."""
        self._ghosts.pop(join.node.digest, None)
        self._ghosts[join.node.digest] = join.origin, join.num_hits
        if len(self._ghosts) > MAX_GHOSTS:
            del self._ghosts[next(iter(self._ghosts))]

    def _bequeath(self, gone: JoinPoint, heir: JoinPoint) -> None:
        """Whoever would have started at an evicted join point will start at the one below it."""
        now = max(gone.interest.since, heir.interest.since)
        uses = gone.interest.at(now).expected(self._order.chance(gone.origin, gone.num_hits))
        heir.interest = heir.interest.at(now)
        heir.interest.inherited += uses
        self.push(heir)

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
        self.living[join] = None
        if join.kind not in (JoinKind.REST, JoinKind.RUNNING):
            self._order.note_made(join.kind, join.num_hits)
        self.push(join)
        return join

    def _bury(self, join: JoinPoint) -> None:
        join.alive = False
        join.node.join = None
        del self.living[join]
        self._unvalued.pop(join, None)
        for group, blocks in zip(self._tree.sliding, join.blocks, strict=False):
            self._groups[group].pool.unkeep(blocks)
        self._tree.release(join.node)
        self._tree.on_change(join.node)
