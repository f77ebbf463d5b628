"""A prefix tree over pools without sequences: prefixes are planted by name, for tests of what keeps and evicts them."""

from __future__ import annotations

from hkv_jax.kvcache.group_cache import GroupCache
from hkv_jax.kvcache.layout import KVLayout
from hkv_jax.kvcache.prefix_tree import Node, PrefixTree


class PlantedPrefixes:
    """Each letter of a name is one node; "ab" and "ac" share the first.

    What is planted is loose: it can be found, and nobody holds it.
    """

    def __init__(self, layout: KVLayout) -> None:
        """An empty tree."""
        self.groups = [GroupCache(group, layout.arenas[group.arena].num_slabs, 1) for group in layout.groups]
        self.tree = PrefixTree(self.groups, layout.largest_block_size)

    def plant(self, name: str) -> Node:
        """The last node of a prefix; those that lack are made, with all their blocks."""
        node = self.tree.root
        for end in range(1, len(name) + 1):
            digest = name[:end].encode()
            known = self.tree.find(digest)
            node = known or self.tree.insert(node, digest)
            if known is None:
                for group, cache in enumerate(self.groups):
                    pool, count = cache.pool, len(node.blocks[group])
                    blocks = pool.allocate(count) if count <= pool.num_free - pool.num_loose else None
                    assert blocks is not None, "the pools are too small for this test"
                    for index, block in enumerate(blocks):
                        self.tree.name(node, group, index, block)
                    cache.pool.release(blocks)
        return node

    def find(self, name: str) -> Node | None:
        """The node of a prefix, if it is still there."""
        return self.tree.find(name.encode())

    def hold(self, name: str) -> None:
        """As if a running sequence had the prefix in its tables: of sliding groups the last node's blocks."""
        for cache, blocks in zip(self.groups, self.blocks_of(name), strict=True):
            cache.pool.retain(blocks)

    def let_go(self, name: str) -> None:
        """Undoes ``hold``."""
        for cache, blocks in zip(self.groups, self.blocks_of(name), strict=True):
            cache.pool.release(blocks)

    def blocks_of(self, name: str) -> list[list[int]]:
        """By group, what ``hold`` holds."""
        node, at = self._node(name), self._node(name)
        blocks = [list(ids) for ids in node.blocks]
        while at.parent is not None and at.parent.blocks:
            at = at.parent
            for group in self.tree.globals:
                blocks[group] += at.blocks[group]
        return blocks

    def forget(self, group: int, block: int) -> None:
        """Takes a loose block for something else, and gives that up again."""
        pool = self.groups[group].pool
        others = [other for other in range(pool.num_ids) if other != block and self._is_loose(group, other)]
        pool.retain(others)
        taken = pool.allocate(pool.num_free)
        assert taken is not None
        assert taken[-1] == block, f"block {block} of group {group} is not loose"
        pool.release(taken)
        pool.release(others)

    def _is_loose(self, group: int, block: int) -> bool:
        pool = self.groups[group].pool
        return pool.has_name(block) and not pool.references(block) and not pool.keeps(block)

    def _node(self, name: str) -> Node:
        node = self.find(name)
        assert node is not None, f"{name} is not there"
        return node
