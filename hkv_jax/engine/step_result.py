"""What a step brings back from the device: the drawn tokens and, where asked for, logprobs.

Owns: the types that cross from the runner to ``Scheduler.commit``. Must never: import jax; arrays here are numpy, on
the host.

Axis letters: T query tokens, S rows of the step's bucket.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from hkv_jax.outputs import TokenLogprob


@dataclasses.dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of the model's own probabilities, for N tokens.

    chosen f32[N]: of the token itself. top_ids i32[N, 20], top_logprobs f32[N, 20]: the most likely ones, first the
    likeliest.
    """

    chosen: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]

    def of(self, index: int, token_id: int, num_top: int) -> TokenLogprob:
        """The entry at ``index`` for ``token_id``, with its ``num_top`` (0 … 20) most likely tokens."""
        ids, values = self.top_ids[index, :num_top].tolist(), self.top_logprobs[index, :num_top].tolist()
        return TokenLogprob(token_id, float(self.chosen[index]), tuple(zip(ids, values, strict=True)))


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """Result of one step.

    tokens i32[S]: what each row drew; rows that draw nothing hold anything. logprobs: over [S], ``None`` when no row
    asked.
    prompt_logprobs: over [T], at i that of ``targets[i]`` given the tokens up to i; ``None`` when no row asked.
    """

    tokens: NDArray[np.int32]
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
