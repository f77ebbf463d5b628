"""The limits a scheduler keeps to.

Owns: ``SchedulerConfig``, and what it refuses. Must never: hold state, or import jax.
"""

from __future__ import annotations

import dataclasses

from hkv_jax.engine.request import Request
from hkv_jax.errors import RequestError


@dataclasses.dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step and of a sequence, in sequences and tokens.

    ``max_prefill_chunk`` bounds the tokens of *one* sequence in a step; ``max_model_len`` its prompt and output
    together; ``max_bypass_seconds`` how long others may be admitted before an older one; ``max_prefix_wait_seconds``
    how long one waits for a prefix that another computes.

    Raises:
        ValueError: a limit is below 1 (0 for seconds), or the step's budget has not one token for every running
            sequence.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_prefill_chunk: int
    max_model_len: int
    vocab_size: int
    max_bypass_seconds: float = 30.0
    max_prefix_wait_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 0 if field.name.endswith("_seconds") else 1
            if getattr(self, field.name) < least:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be at least {least}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least max_num_seqs, "
                f"{self.max_num_seqs}, since every running sequence takes a token of each step"
            )

    def check(self, request: Request) -> None:
        """Refuses what could never be served.

        Raises:
            RequestError: the prompt is too long, or an id is outside the vocabulary.
        """
        limit = self.max_model_len
        if request.prompt_len >= limit:
            raise RequestError(
                f"the prompt has {request.prompt_len} tokens; max_model_len {limit} leaves room for at most {limit - 1}"
            )
        if int(request.prompt.max()) >= self.vocab_size:
            raise RequestError(f"the prompt holds an id outside the vocabulary; ids are 0 to {self.vocab_size - 1}")
        request.params.check_for_model(self.vocab_size)
