"""How an admitted sequence uses the cached prefix of its tokens.

Owns: ``PrefixUse``, which crosses from admission to the runner and to a request's usage. Must never: import jax, or
know blocks: they may move.
"""

from __future__ import annotations

import dataclasses

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
    def rebuilt_tokens(self) -> int:
        """Computed tokens whose K/V the global groups held already."""
        return max(0, self.matched - self.start)
