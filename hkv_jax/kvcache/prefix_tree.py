"""Which cached block holds which tokens: a tree of prefixes, one node for each full block of the largest size.

Owns: nodes, the names of blocks, and what a lost block takes with it. Must never: decide what is worth keeping.

A node is found only while every global block of its tokens has a name, and so have its ancestors. Sliding blocks may
lack: their number tells nothing about the nodes before or after. In a model without global layers a node lives while
any block of it or of its descendants can be found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hkv_jax.kvcache.block_table import HOLE
from hkv_jax.kvcache.group_cache import GroupCache

if TYPE_CHECKING:
    from hkv_jax.kvcache.join_point import JoinPoint


class Node:
    """Tokens ``[end - P_max, end)`` of some prefix.

    Attributes:
        blocks: ids of its blocks by group, ``HOLE`` where one cannot be found; the root has none.
        need: join points that need its global blocks: its own, plus children that are needed themselves.
        join: the join point at ``end``.
        pins: running sequences whose prefix ends here.
        alive: False once it was dropped from the tree.
    """

    __slots__ = ("alive", "blocks", "children", "digest", "end", "join", "need", "parent", "pins")

    def __init__(self, digest: bytes, parent: Node | None, end: int, blocks: list[list[int]]) -> None:
        self.digest = digest
        self.parent = parent
        self.end = end
        self.blocks = blocks
        self.children: dict[bytes, Node] = {}
        self.need = 0
        self.join: JoinPoint | None = None
        self.pins = 0
        self.alive = True


class PrefixTree:
    """All nodes.

    ``on_insert(digest)`` and ``on_change(node)`` (dropped, or its join point came or went) tell whoever waits for a
    prefix.

    Invariants. X1: a block has a name exactly where one node lists it. X2: in a model with global layers every node
    but the root lists all its global blocks. X3: ``need`` counts as it says, and the global blocks of a needed node
    are kept once.
    """

    def __init__(self, groups: list[GroupCache], block_size: int) -> None:
        """An empty tree over ``groups``; ``block_size`` is P_max in tokens."""
        self.root = Node(b"", None, 0, [])
        self.block_size = block_size
        self.globals = [index for index, group in enumerate(groups) if group.window is None]
        self.sliding = [index for index, group in enumerate(groups) if group.window is not None]
        self.on_insert: Callable[[bytes], None] = lambda digest: None
        self.on_change: Callable[[Node], None] = lambda node: None
        self._groups = groups
        self._per_node = [block_size // group.block_size for group in groups]
        self._owners: list[dict[int, Node]] = [{} for _ in groups]
        self._nodes: dict[bytes, Node] = {}
        for index, group in enumerate(groups):
            group.pool.on_forget = self._forgetter(index)

    def __len__(self) -> int:
        return len(self._nodes)

    def find(self, digest: bytes) -> Node | None:
        """The node of a prefix, whatever became of the nodes before it."""
        return self._nodes.get(digest)

    def insert(self, parent: Node, digest: bytes) -> Node:
        """The child of ``parent``, which is made where there is none; a new one lists no block yet."""
        node = parent.children.get(digest)
        if node is None:
            holes = [[HOLE] * count for count in self._per_node]
            node = Node(digest, parent, parent.end + self.block_size, holes)
            parent.children[digest] = node
            self._nodes[digest] = node
            self.on_insert(digest)
        return node

    def name(self, node: Node, group: int, index: int, block: int) -> None:
        """Lists a held, nameless block as the ``index``-th of ``node`` in a group that lists none there."""
        assert node.blocks[group][index] == HOLE, "X1: a node lists two blocks for the same tokens"
        node.blocks[group][index] = block
        self._owners[group][block] = node
        self._groups[group].pool.name(block)

    def rename(self, group: int, source: int, target: int) -> None:
        """Lists block ``target`` wherever ``source`` is listed: their contents are the same."""
        node = self._owners[group].pop(source, None)
        if node is not None:
            blocks = node.blocks[group]
            blocks[blocks.index(source)] = target
            self._owners[group][target] = node

    def tail(self, node: Node) -> list[list[int]] | None:
        """The sliding blocks by sliding group that cover the window before ``node.end``; ``None`` where one lacks."""
        tail = []
        for group in self.sliding:
            cache = self._groups[group]
            per_node, size = self._per_node[group], cache.block_size
            missing = node.end // size - cache.first_live(node.end)
            blocks: list[int] = []
            at: Node | None = node
            while missing > 0:
                if at is None or not at.blocks:
                    return None
                part = at.blocks[group] if missing >= per_node else at.blocks[group][-missing:]
                if HOLE in part:
                    return None
                blocks[:0] = part
                missing -= len(part)
                at = at.parent
            tail.append(blocks)
        return tail

    def ends_whole(self, node: Node) -> bool:
        """Whether the last block of every sliding group is there: without them there is no tail."""
        return all(node.blocks[group][-1] != HOLE for group in self.sliding)

    def need(self, node: Node) -> None:
        """One more join point needs ``node`` and all before it."""
        at: Node | None = node
        while at is not None and at.blocks:
            at.need += 1
            if at.need > 1:
                return
            for group in self.globals:
                self._groups[group].pool.keep(at.blocks[group])
            at = at.parent

    def release(self, node: Node) -> None:
        """Undoes one ``need`` of ``node``."""
        at: Node | None = node
        while at is not None and at.blocks:
            at.need -= 1
            if at.need:
                return
            for group in self.globals:
                self._groups[group].pool.unkeep(at.blocks[group])
            at = at.parent

    def pin(self, node: Node) -> None:
        """A running sequence's prefix ends at ``node``: it stays, blocks or not."""
        node.pins += 1

    def unpin(self, node: Node) -> None:
        """Undoes one ``pin``; a node nobody can find anything by goes."""
        node.pins -= 1
        self._prune(node)

    def clear(self) -> None:
        """Drops every node; none is pinned or needed."""
        for node in list(self._nodes.values()):
            assert not node.pins and not node.need, "X3: a node is in use"
            self._bury(node)
        self.root.children.clear()

    def is_idle(self, node: Node) -> bool:
        """Whether no table holds the node's global blocks."""
        return all(not self._groups[g].pool.references(node.blocks[g][0]) for g in self.globals)

    def check_invariants(self) -> None:
        """Asserts X1 to X3."""
        listed: list[dict[int, Node]] = [{} for _ in self._groups]
        for node in self._nodes.values():
            assert node.alive and node.parent is not None and node.parent.children[node.digest] is node, "X1"
            assert node.parent is self.root or node.parent.alive, "X2: a node outlived its parent"
            for group, blocks in enumerate(node.blocks):
                for block in blocks:
                    if block != HOLE:
                        assert block not in listed[group], "X1: two nodes list one block"
                        listed[group][block] = node
                if group in self.globals:
                    assert HOLE not in blocks, "X2: a node lacks a global block"
                    keeps = [self._groups[group].pool.keeps(block) for block in blocks]
                    assert keeps == [int(node.need > 0)] * len(keeps), "X3: needed and not kept, or kept and not needed"
            needed = sum(child.need > 0 for child in node.children.values()) + (node.join is not None)
            assert node.need == needed, "X3: need is miscounted"
        for group, cache in enumerate(self._groups):
            assert listed[group] == self._owners[group], "X1: the owners are not the listed ones"
            assert all(cache.pool.has_name(block) for block in listed[group]), "X1: a listed block has no name"
            num_named = sum(cache.pool.has_name(block) for block in range(cache.pool.num_ids))
            assert num_named == len(listed[group]), "X1: a name that no node lists"

    def _forgetter(self, group: int) -> Callable[[int], None]:
        return lambda block: self._forget(group, block)

    def _forget(self, group: int, block: int) -> None:
        """The pool took a named block for something new."""
        node = self._owners[group].pop(block)
        blocks = node.blocks[group]
        blocks[blocks.index(block)] = HOLE
        if group in self.globals:
            self._drop(node)
        else:
            self._prune(node)

    def _drop(self, node: Node) -> None:
        """Removes a node that lost a global block, with all after it: nothing there can be found any more."""
        assert node.parent is not None
        del node.parent.children[node.digest]
        pending = [node]
        while pending:
            gone = pending.pop()
            pending.extend(gone.children.values())
            assert not gone.need and not gone.pins, "X3: a needed node lost its block"
            self._bury(gone)

    def _prune(self, node: Node) -> None:
        """Removes nodes by which nothing can be found, from ``node`` toward the root."""
        at = node
        while at.parent is not None and at.alive and not (at.children or at.pins or at.need):
            if any(block != HOLE for blocks in at.blocks for block in blocks):
                return
            del at.parent.children[at.digest]
            self._bury(at)
            at = at.parent

    def _bury(self, node: Node) -> None:
        node.alive = False
        del self._nodes[node.digest]
        for group, blocks in enumerate(node.blocks):
            for index, block in enumerate(blocks):
                if block != HOLE:
                    del self._owners[group][block]
                    blocks[index] = HOLE
                    self._groups[group].pool.unname(block)
        self.on_change(node)
