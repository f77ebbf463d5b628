"""What the prefix cache saved, in numbers.

Owns: the counts of hits by kind and of tokens. Must never: decide anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.outputs import PrefixHit


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixStats:
    """Counts since the start; each request counts once, at its first admission.

    Attributes:
        hits: requests by kind of hit.
        prompt_tokens: tokens of their prompts, of which ``prefix_hit_tokens`` lay before the first computed one and
            ``computed_prompt_tokens`` did not; ``rebuilt_tokens`` of those were computed although the global groups
            held their K/V.
        recomputed_tokens: computed again after a preemption.
        prefix_waits: times a request waited for a prefix that another was computing.
    """

    hits: Mapping[PrefixHit, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(PrefixHit, 0))
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    computed_prompt_tokens: int = 0
    rebuilt_tokens: int = 0
    recomputed_tokens: int = 0
    prefix_waits: int = 0

    def after_admission(self, prompt_len: int, use: PrefixUse) -> PrefixStats:
        """With one more request that begins to run."""
        return dataclasses.replace(
            self,
            hits={**self.hits, use.hit: self.hits[use.hit] + 1},
            prompt_tokens=self.prompt_tokens + prompt_len,
            prefix_hit_tokens=self.prefix_hit_tokens + use.start,
            computed_prompt_tokens=self.computed_prompt_tokens + prompt_len - use.start,
            rebuilt_tokens=self.rebuilt_tokens + use.rebuilt_tokens,
        )

    def after_readmission(self, num_tokens: int, use: PrefixUse) -> PrefixStats:
        """With a sequence of ``num_tokens`` known tokens that runs again."""
        return dataclasses.replace(self, recomputed_tokens=self.recomputed_tokens + num_tokens - use.start)
