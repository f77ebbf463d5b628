"""What the engine tells the world about a sequence after a step."""

from __future__ import annotations

import dataclasses

from hkv_jax.engine.request import Sequence
from hkv_jax.outputs import FinishReason, TokenLogprob


@dataclasses.dataclass(slots=True)
class TokenEvent:
    """One more token of one sequence.

    ``logprob`` is there when the request asked for logprobs; ``prompt_logprobs`` comes once, with the first token of
    sample 0. ``finish_reason`` is set on a sequence's last token; ``stop_reason`` is the stop id that ended it.
    """

    sequence: Sequence
    token_id: int
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
