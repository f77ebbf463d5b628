"""How much of a sequence's tokens is cached, and where it therefore begins to compute.

Owns: ``PrefixPath``, a match that is revised instead of repeated, and the choice between hit, truncation and rebuild.
Must never: import jax, or hold blocks: what is found may be evicted before it is used.
"""

from __future__ import annotations

import dataclasses

from hkv_jax.kvcache.join_point import JoinKind
from hkv_jax.kvcache.prefix_tree import Node, PrefixTree
from hkv_jax.kvcache.token_chain import TokenChain
from hkv_jax.outputs import PrefixHit


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixUse:
    """Where one admission begins to compute; all positions in tokens.

    Attributes:
        start: the first position that is computed; below it nothing runs in the sequence's lane.
        matched: p, up to where the global groups hold cached K/V; ``start`` at least where the sequence has no other
            reason to compute more.
        hit: the kind of hit.
        context_start: from where on the sliding layers have K/V at all: 0 where a cached tail was loaded or nothing was
            skipped, ``start`` where the tail is rebuilt. A multiple of every group's block size.
    """

    start: int
    matched: int
    hit: PrefixHit
    context_start: int

    @property
    def loads_tail(self) -> bool:
        """Whether the sliding groups begin with the cached tail before ``start``."""
        return bool(self.start) and not self.context_start

    @property
    def rebuilt_tokens(self) -> int:
        """Computed tokens whose K/V the global groups held already."""
        return max(0, self.matched - self.start)


NO_PREFIX = PrefixUse(0, 0, PrefixHit.MISS, 0)


class PrefixPath:
    """The nodes of a sequence's tokens, as far as they are cached.

    ``nodes`` are those of the full blocks from the first on; in a model without global layers some may be missing
    (``None``). ``limit`` is how many blocks may be matched: all but what holds the last known token.
    """

    __slots__ = ("chain", "limit", "nodes")

    def __init__(self, chain: TokenChain, limit: int) -> None:
        self.chain = chain
        self.limit = limit
        self.nodes: list[Node] = []

    def refresh(self, tree: PrefixTree) -> None:
        """Drops what is no longer cached and adds what has come; costs what has changed."""
        nodes = self.nodes
        if not tree.globals:
            # Nothing hangs together here: the longest prefix with a whole tail is looked for from the end.
            self.nodes = _last_with_tail(tree, self.chain, self.limit)
            return
        while nodes and not nodes[-1].alive:
            nodes.pop()
        node = nodes[-1] if nodes else tree.root
        for digest in self.chain.digests[len(nodes) : self.limit]:
            child = node.children.get(digest)
            if child is None:
                break
            nodes.append(child)
            node = child

    @property
    def matched(self) -> int:
        """p in tokens."""
        return self.nodes[-1].end if self.nodes else 0

    @property
    def next_digest(self) -> bytes | None:
        """Of the first block that is not cached; ``None`` where all that may be matched are."""
        place = self.matched // self.chain.block_size
        return self.chain.digests[place] if place < self.limit else None

    def node_at(self, position: int) -> Node:
        """The matched node that ends at ``position``; there must be one."""
        return next(node for node in reversed(self.nodes) if node.end == position)

    def choose(self, tree: PrefixTree, rebuild_tokens: int | None) -> PrefixUse:
        """Where to begin: after the longest prefix with a tail, or R tokens before the end of the cached one."""
        matched = self.matched
        if not matched:
            return NO_PREFIX
        with_tail = next((node.end for node in reversed(self.nodes) if _has_tail(tree, node)), 0)
        rebuilt = 0
        if rebuild_tokens is not None and matched > rebuild_tokens:
            rebuilt = (matched - rebuild_tokens) // tree.block_size * tree.block_size
        if rebuilt > with_tail:
            return PrefixUse(rebuilt, matched, PrefixHit.REBUILD, rebuilt)
        if with_tail == matched:
            return PrefixUse(matched, matched, PrefixHit.RESIDENT, 0)
        if with_tail:
            return PrefixUse(with_tail, matched, PrefixHit.TRUNCATE, 0)
        return PrefixUse(0, matched, PrefixHit.MISS, 0)


def _has_tail(tree: PrefixTree, node: Node) -> bool:
    join = node.join
    if join is not None and join.kind is not JoinKind.REST:
        return True
    return tree.ends_whole(node) and tree.tail(node) is not None


def _last_with_tail(tree: PrefixTree, chain: TokenChain, limit: int) -> list[Node]:
    for digest in reversed(chain.digests[:limit]):
        node = tree.find(digest)
        if node is not None and tree.tail(node) is not None:
            return [node]
    return []
