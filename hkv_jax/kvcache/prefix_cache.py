"""The prefix cache: what running sequences leave behind, and how later ones take it up.

Owns: for each lane how far its prefix is in the tree and what it left there. Must never: allocate or move blocks
(``CacheManager`` does), or decide who runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hkv_jax.kvcache.block_table import HOLE
from hkv_jax.kvcache.group_cache import GroupCache
from hkv_jax.kvcache.join_point import JoinKind, JoinPoint
from hkv_jax.kvcache.join_points import JoinPoints
from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.kvcache.prefix_match import PrefixPath, PrefixUse
from hkv_jax.kvcache.prefix_tree import Node, PrefixTree
from hkv_jax.kvcache.receptive import receptive_tokens
from hkv_jax.kvcache.token_chain import TokenChain


@dataclasses.dataclass(slots=True)
class _LanePrefix:
    """A running sequence's place in the tree.

    ``node``: the last block of its tokens that is in the tree. ``exact_blocks``: by group, the first block number whose
    sliding K/V is what a cold run would have computed. ``zone``: nodes of cached tokens that it computes again, last
    first. ``joins``: the join points it made or started from. ``running``: the one at its last full block. ``passed``:
    all windows of the lane have left the tails of join points up to there.
    """

    node: Node
    exact_blocks: list[int]
    zone: list[Node]
    joins: list[JoinPoint] = dataclasses.field(default_factory=list)
    running: JoinPoint | None = None
    passed: int = 0


class PrefixCache:
    """Over the groups of one ``CacheManager``; ``block_size`` is P_max. ``now`` is its clock in seconds."""

    def __init__(self, groups: list[GroupCache], block_size: int, policy: CachePolicy) -> None:
        """An empty prefix cache."""
        self.now = 0.0
        self.block_size = block_size
        self.policy = policy
        self.tree = PrefixTree(groups, block_size)
        self.rebuild_tokens: int | None = None
        if policy.tail_repair or not self.tree.sliding:
            specs = [group.layout.spec for group in groups]
            self.rebuild_tokens = receptive_tokens(specs, [group.block_size for group in groups])
        self.joins = JoinPoints(self.tree, groups, policy.order, self.rebuild_tokens)
        self._groups = groups
        self._widest_window = max((group.window for group in groups if group.window is not None), default=1)
        self._lanes: dict[int, _LanePrefix] = {}

    def choose(self, path: PrefixPath) -> PrefixUse:
        """Where a sequence would begin to compute now."""
        path.refresh(self.tree)
        return path.choose(self.tree, self.rebuild_tokens)

    def rests_on_joins(self, path: PrefixPath, use: PrefixUse) -> bool:
        """Whether ``use`` stays possible until ``tree.on_change`` says otherwise: no block of it is loose by itself."""
        return not use.loads_tail or self.join_of(path, use) is not None

    def join_of(self, path: PrefixPath, use: PrefixUse) -> JoinPoint | None:
        """The join point that a sequence with this ``use`` starts from."""
        if not use.loads_tail:
            return None
        join = path.node_at(use.start).join
        return None if join is None or join.kind is JoinKind.REST else join

    def is_running(self, path: PrefixPath) -> bool:
        """Whether running sequences hold the whole of a path's prefix."""
        return bool(path.nodes) and path.nodes[-1].alive and not self.tree.is_idle(path.nodes[-1])

    def await_join(self, join: JoinPoint, change: int) -> None:
        """One sequence more (or less) waits to start from ``join``."""
        join.num_waiting += change
        if join.alive:
            if change > 0:
                join.interest = join.interest.at(self.now)
            self.joins.push(join)

    def loaded_blocks(self, path: PrefixPath, use: PrefixUse) -> list[list[int]]:
        """By group, the cached blocks that a sequence with this ``use`` takes over."""
        if not path.nodes:
            return [[] for _ in self._groups]
        taken: list[list[int]] = []
        tails = iter(self._tail_at(path, use.start) if use.loads_tail else ())
        for group, cache in enumerate(self._groups):
            if cache.window is None:
                taken.append([block for node in path.nodes for block in node.blocks[group]])
            else:
                taken.append(next(tails, []))
        return taken

    def attach(self, lane: int, path: PrefixPath | None, use: PrefixUse) -> None:
        """A sequence that starts with ``use`` has the loaded blocks in the tables of ``lane``."""
        node = path.nodes[-1] if path is not None and path.nodes else self.tree.root
        exact = [0] * len(self._groups)
        if use.context_start:
            exact = [0 if c.window is None else c.first_live(use.matched) for c in self._groups]
        zone = [] if path is None else [n for n in reversed(path.nodes) if n.end > use.start]
        state = _LanePrefix(node, exact, zone)
        self.tree.pin(node)
        self._lanes[lane] = state
        if path is not None:
            digests = path.chain.digests
            past = range(path.limit - 1, use.start // self.block_size - 1, -1)
            self.joins.look_for_ghosts(digests[i] for i in past)
            if use.loads_tail and self.policy.checkpoints:
                state.joins.append(self.joins.use(path.node_at(use.start), self.now))

    def record(self, lane: int, chain: TokenChain, num_tokens: int) -> None:
        """Puts the full blocks of the lane's first ``num_tokens`` tokens into the tree; their step is dispatched.

        Where the tree has a block already, the lane's table takes that one and its own is given back.
        """
        state = self._lanes[lane]
        size = self.block_size
        while state.zone and state.zone[-1].end <= num_tokens:
            self._record_node(lane, state, state.zone.pop())
        node = state.node
        begin = node.end // size
        for place in range(begin, num_tokens // size):
            node = self.tree.insert(node, chain.digests[place])
            self._record_node(lane, state, node)
        if node is not state.node:
            self.tree.pin(node)
            self.tree.unpin(state.node)
            state.node = node

    def join(self, lane: int, position: int, kind: JoinKind) -> None:
        """Makes a join point at ``position``, a multiple of P_max that the lane has recorded, if its tail is whole."""
        if not self.policy.checkpoints:
            return
        state = self._lanes[lane]
        node = self._ancestor(state.node, position)
        if not node.blocks:
            return
        join = self.joins.create(node, kind, self.now)
        if kind is JoinKind.RUNNING and state.running is not None and state.running is not join:
            if state.running.kind is JoinKind.RUNNING:
                self.joins.remove(state.running)
            if not state.running.alive:
                # A long sequence leaves one at each of its blocks, and all of them are looked at as windows move.
                state.joins.remove(state.running)
            state.running = None
        if join is None:
            return
        if kind is JoinKind.RUNNING:
            state.running = join
        if join not in state.joins:
            state.joins.append(join)

    def note_released(self, lane: int, position: int) -> None:
        """Blocks that no token of the lane from ``position`` on sees, and that join points keep, have left its tables.

        Join points all of whose tail left before are what they were, and the one that moves along with the lane is not
        worth a look each step.
        """
        state = self._lanes[lane]
        self.push([join for join in state.joins if join.node.end > state.passed and join is not state.running])
        state.passed = position - self._widest_window + 1

    def follow(self, source: int, target: int) -> None:
        """Lane ``target`` has taken over the tokens of ``source``."""
        leader = self._lanes[source]
        self.tree.pin(leader.node)
        self._lanes[target] = _LanePrefix(leader.node, list(leader.exact_blocks), list(leader.zone), list(leader.joins))

    def push(self, joins: list[JoinPoint]) -> None:
        """Blocks of these join points, and perhaps of others, have come free."""
        self.joins.released = True
        for join in joins:
            if join.alive:
                self.joins.push(join)

    def detach(self, lane: int) -> list[JoinPoint]:
        """The lane's sequence is about to leave; returns its join points, to be pushed once its blocks are released."""
        state = self._lanes.pop(lane)
        node = state.node
        if node.blocks and not node.need:
            rest = self.joins.leave_rest(node, self.now)
            if rest is not None:
                state.joins.append(rest)
        self.tree.unpin(node)
        return state.joins

    def clear(self) -> None:
        """Forgets everything: the memory it describes is lost. No lane is attached."""
        assert not self._lanes, "a lane is still attached"
        for join in list(self.joins.living):
            self.joins.remove(join)
        self.tree.clear()

    def rename(self, group: int, moved: Mapping[int, int]) -> None:
        """Blocks of a group have new ids, by their old ones."""
        for source, target in moved.items():
            self.tree.rename(group, source, target)
        if group in self.tree.sliding:
            self.joins.rename(group, moved)

    def check_invariants(self) -> None:
        """Asserts X1-X3 and J1."""
        self.tree.check_invariants()
        self.joins.check_invariants()

    def _record_node(self, lane: int, state: _LanePrefix, node: Node) -> None:
        for group, cache in enumerate(self._groups):
            table = cache.tables[lane]
            listed = node.blocks[group]
            first = (node.end - self.block_size) // cache.block_size
            for index, known in enumerate(listed):
                number = first + index
                block = table.id_of(number)
                if block in (HOLE, known):
                    continue
                if known == HOLE:
                    exact = number >= state.exact_blocks[group] and table.is_whole(number)
                    if exact and not cache.pool.has_name(block):
                        self.tree.name(node, group, index, block)
                elif cache.window is None:
                    cache.replace(lane, number, known)

    def _tail_at(self, path: PrefixPath, position: int) -> list[list[int]]:
        tail = self.tree.tail(path.node_at(position))
        assert tail is not None, "a tail was lost between match and admission"
        return tail

    def _ancestor(self, node: Node, position: int) -> Node:
        while node.end > position:
            assert node.parent is not None
            node = node.parent
        return node
