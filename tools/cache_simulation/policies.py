"""The ways of keeping a cache that a simulation compares.

Owns: their names, what each changes, and plain LRU, which the engine does not have. Must never: implement a cache
(``hkv_jax.kvcache`` does).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from hkv_jax.kvcache.join_point import JoinKind, JoinPoint, Stake
from hkv_jax.kvcache.policy import CachePolicy
from tools.cache_simulation.model_geometry import ModelGeometry


class LeastRecentlyUsed:
    """Evicts what was used longest ago, whatever it would save or free."""

    def key(self, join: JoinPoint, stake: Stake) -> float:
        """When it was used last."""
        return join.interest.since

    def chance(self, kind: JoinKind, num_uses: int) -> float:
        """All alike."""
        return 1.0

    def note_made(self, kind: JoinKind, num_uses: int) -> None:
        """Nothing is learned."""

    def note_used(self, kind: JoinKind, num_uses: int) -> None:
        """Nothing is learned."""


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """One way; ``summary`` is for ``--help``. ``all_global``: the cache knows no windows."""

    name: str
    summary: str
    cache_policy: Callable[[], CachePolicy] = CachePolicy
    all_global: bool = False

    def geometry(self, geometry: ModelGeometry) -> ModelGeometry:
        """The model as the cache of this policy sees it."""
        return geometry.all_global() if self.all_global else geometry


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("hybrid", "the engine's own"),
        Policy("all-global", "sliding layers keep everything, as a cache without windows would", all_global=True),
        Policy("no-tails", "no sliding tail is kept for later requests", lambda: CachePolicy(checkpoints=False)),
        Policy(
            "no-tails-no-rebuild",
            "no sliding tail is kept, and none is rebuilt",
            lambda: CachePolicy(checkpoints=False, tail_repair=False),
        ),
        Policy("no-rebuild", "a lost tail shortens the hit", lambda: CachePolicy(tail_repair=False)),
        Policy(
            "truncate-lru",
            "no-rebuild, and what was used longest ago is evicted first",
            lambda: CachePolicy(tail_repair=False, order=LeastRecentlyUsed()),
        ),
        Policy("no-cache", "nothing is kept when a request ends", lambda: CachePolicy(enabled=False)),
    )
}
