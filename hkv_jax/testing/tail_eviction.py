"""Sliding tails evicted by hand, so that a request must do without.

Owns: ``evict_tails``. Must never: touch global blocks, or run while sequences do.
"""

from __future__ import annotations

from hkv_jax.kvcache.manager import CacheManager


def evict_tails(cache: CacheManager, above: int = 0) -> None:
    """Takes every sliding block that no join point at or below position ``above`` keeps, as those in need would.

    Nobody runs.
    """
    joins, tree = cache.prefixes.joins, cache.prefixes.tree
    for join in list(joins.living):
        if join.node.end > above:
            joins.remove(join)
    for group in tree.sliding:
        pool = cache.prefixes._groups[group].pool
        taken = pool.allocate(pool.num_free)
        assert taken is not None
        pool.release(taken)
