"""The order in which cached join points are evicted: least worth first.

Owns: how likely a join point of each kind is used again, learned from those that were made. Must never: know blocks.
"""

from __future__ import annotations

import math

from hkv_jax.kvcache.join_point import HALF_LIFE_SECONDS, JoinKind, JoinPoint, Stake

PRIOR = {
    JoinKind.PROMPT_END: 0.3,
    JoinKind.BEFORE_END: 0.3,
    JoinKind.BRANCH: 0.8,
    JoinKind.TURN: 0.6,
}
"""Chance that somebody joins at a join point of each kind, before any was seen."""

PRIOR_WEIGHT = 16.0
"""How many join points the prior counts for."""

MEMORY = 256.0
"""Join points of a kind after which older ones count for 1/e: traffic changes."""

MAX_USES = 3
"""Join points used more often than this are counted with those used so often."""

WAITING_WEIGHT = 8.0
"""Uses that a waiting request counts for: it comes for certain, and soon."""


class WorthOrder:
    """Expected tokens of work saved, per byte, with recency.

    The key is a logarithm, so that the passing of time, which halves all of them alike, changes no order. Chances are
    counted over all join points, those that are gone included (counting survivors alone would flatter them), and apart
    for those that were used before: a document asked about twice will be asked about again, while the end of a turn
    that was continued will not.
    """

    def __init__(self) -> None:
        uses = range(MAX_USES + 1)
        self._made = {(kind, n): PRIOR_WEIGHT for kind in PRIOR for n in uses}
        self._used = {
            (kind, n): PRIOR_WEIGHT * (1 - (1 - chance) * 0.5**n) for kind, chance in PRIOR.items() for n in uses
        }

    def chance(self, kind: JoinKind, num_uses: int) -> float:
        """That a join point of this kind, used so often, is used again."""
        entry = _entry(kind, num_uses)
        return min(1.0, self._used[entry] / self._made[entry])

    def key(self, join: JoinPoint, stake: Stake) -> float:
        """The base-2 logarithm of tokens saved per byte, at time 0."""
        if not stake.num_bytes:
            return math.inf
        uses = join.interest.expected(self.chance(join.origin, join.num_hits)) + join.num_waiting * WAITING_WEIGHT
        if not stake.num_tokens or uses <= 0:
            return -math.inf
        return math.log2(uses * stake.num_tokens / stake.num_bytes) + join.interest.since / HALF_LIFE_SECONDS

    def note_made(self, kind: JoinKind, num_uses: int) -> None:
        """A join point came to have been used so often."""
        entry, fading = _entry(kind, num_uses), 1 - 1 / MEMORY
        self._made[entry] = self._made[entry] * fading + 1
        self._used[entry] *= fading

    def note_used(self, kind: JoinKind, num_uses: int) -> None:
        """One that had been used so often was used, or would have been, had it not been evicted."""
        self._used[_entry(kind, num_uses)] += 1


def _entry(kind: JoinKind, num_uses: int) -> tuple[JoinKind, int]:
    return JoinKind.TURN if kind is JoinKind.RUNNING else kind, min(num_uses, MAX_USES)
