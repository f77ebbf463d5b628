"""The order in which cached join points are evicted: least worth first.

Owns: how likely a join point of each kind is used again. Must never: know blocks.
"""

from __future__ import annotations

import math

from hkv_jax.kvcache.join_points import JoinKind, JoinPoint, Stake

HALF_LIFE_SECONDS = 10.0
"""A join point left alone for so long is half as likely to be used again."""

REUSE = {
    JoinKind.PROMPT_END: 0.3,
    JoinKind.BEFORE_END: 0.3,
    JoinKind.BRANCH: 0.8,
    JoinKind.TURN: 0.6,
    JoinKind.RUNNING: 0.6,
    JoinKind.REST: 0.3,
}
"""Chance that somebody joins at a new join point of each kind."""


class WorthOrder:
    """Expected tokens of work saved, per byte, with recency.

    The key is a logarithm, so that the passing of time, which halves all of them alike, changes no order.
    """

    def key(self, join: JoinPoint, stake: Stake) -> float:
        """The base-2 logarithm of tokens saved per byte, at time 0."""
        if not stake.num_bytes:
            return math.inf
        if not stake.num_tokens:
            return -math.inf
        chance = 1 - (1 - REUSE[join.kind]) * 0.5**join.num_hits
        return math.log2(chance * stake.num_tokens / stake.num_bytes) + join.last_use / HALF_LIFE_SECONDS

    def note_match(self, kind: JoinKind, gone: bool) -> None:
        """Chances are fixed."""

    def note_created(self, kind: JoinKind) -> None:
        """Chances are fixed."""
