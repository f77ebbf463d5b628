"""How a sequence's known tokens are cut into chunks, and where join points are left on the way.

Owns: ``Prefill``, what a sequence knows of its own prefix. Must never: allocate, or know other sequences.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from hkv_jax.kvcache.join_point import JoinKind
from hkv_jax.kvcache.prefix_match import PrefixPath, PrefixUse
from hkv_jax.kvcache.token_chain import TokenChain

if TYPE_CHECKING:
    from hkv_jax.engine.request import Sequence

BEFORE_END_TOKENS = 128
"""A question may cross into the last blocks of the document before it: so far before the end join points are left."""


@dataclasses.dataclass(slots=True)
class Prefill:
    """A sequence's digests, its path through the prefix cache, and the join points it is to leave.

    Attributes:
        queued_at: when it began to wait, in seconds of the scheduler's clock.
        waited_for_prefix: it has waited so long that it waits for nobody's prefix any more.
        checkpoints: kinds of join points by position, a multiple of the largest block size.
        followers: sequences that wait until it has computed so many tokens.
    """

    chain: TokenChain
    path: PrefixPath
    queued_at: float = 0.0
    waited_for_prefix: bool = False
    checkpoints: dict[int, JoinKind] = dataclasses.field(default_factory=dict)
    followers: list[tuple[int, Sequence]] = dataclasses.field(default_factory=list)

    @classmethod
    def empty(cls) -> Prefill:
        """Of a sequence nobody looks for in the cache."""
        chain = TokenChain(1)
        return cls(chain, PrefixPath(chain, 0))

    @classmethod
    def of(cls, sequence: Sequence, known_end: int, block_size: int) -> Prefill:
        """Of a sequence that will run its tokens up to ``known_end``, the last of which is always computed."""
        chain = TokenChain(block_size)
        chain.append(sequence.tokens(0, sequence.num_tokens))
        return cls(chain, PrefixPath(chain, (known_end - 1) // block_size))

    def of_sibling(self) -> Prefill:
        """Of a sequence that shares this one's tokens so far, and is past the prompt's full blocks."""
        chain = TokenChain(self.chain.block_size)
        chain.digests = list(self.chain.digests)
        return Prefill(chain, PrefixPath(chain, 0))

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Adds the digests of the tokens that have become known, of ``num_tokens`` in all."""
        if num_tokens - self.chain.num_tokens >= self.chain.block_size:
            self.chain.append(sequence.tokens(self.chain.num_tokens, num_tokens))

    def plan_checkpoints(self, known_end: int, use: PrefixUse) -> None:
        """Where the tokens up to ``known_end``, from which nothing is known, are worth joining."""
        size = self.chain.block_size
        last = (known_end - 1) // size * size
        points = dict.fromkeys(range(max(size, last - BEFORE_END_TOKENS), last, size), JoinKind.BEFORE_END)
        for position in {last, known_end // size * size}:
            points[position] = JoinKind.PROMPT_END
        if use.matched > use.start:
            # Others had this prefix too, and its tail was gone: it is worth having again.
            points[use.matched] = JoinKind.BRANCH
        self.checkpoints = {p: kind for p, kind in sorted(points.items()) if p > use.start}

    def keep_from(self, start: int, end: int) -> int:
        """The first checkpoint of the chunk ``[start, end)``; ``end`` where there is none."""
        return min((p for p in self.checkpoints if start < p <= end), default=end)

    def first_deep_checkpoint(self, start: int, end: int) -> int | None:
        """A checkpoint so far inside the chunk that it must end there: the blocks between would all have to be kept."""
        slack = BEFORE_END_TOKENS + self.chain.block_size
        return min((p for p in self.checkpoints if start < p < end - slack), default=None)
