"""How much a step may hold, from what is set and what the platform suggests.

Owns: the defaults of each platform and how unset limits follow set ones. Must never: ask a device anything.
"""

from __future__ import annotations

import dataclasses

from hkv_jax.config.engine_config import EngineConfig

# Sequences at once and tokens a step. A CPU is saturated by few sequences, and must not spend seconds on one step.
_DEFAULTS = {"cpu": (16, 512), "gpu": (256, 8192), "tpu": (256, 2048)}


@dataclasses.dataclass(frozen=True, slots=True)
class StepLimits:
    """Limits of every step: running sequences, tokens of all of them, tokens of one; neither exceeds the budget."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_prefill_chunk: int


def resolve_limits(config: EngineConfig, platform: str) -> StepLimits:
    """The limits on ``platform``, jax's name for it; one that is not known is taken for a GPU.

    What is set stays; what is not follows it: a budget of 16 lowers the sequences to 16, 1,000 sequences or a chunk of
    10,000 raise the budget.
    """
    num_seqs, num_tokens = _DEFAULTS.get(platform, _DEFAULTS["gpu"])
    budget = config.max_num_batched_tokens or max(num_tokens, config.max_num_seqs or 0, config.max_prefill_chunk or 0)
    return StepLimits(
        max_num_seqs=config.max_num_seqs or min(num_seqs, budget),
        max_num_batched_tokens=budget,
        max_prefill_chunk=config.max_prefill_chunk or budget,
    )
