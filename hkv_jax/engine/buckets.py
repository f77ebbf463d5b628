"""The static shapes of the step, and which of them a plan runs in.

Owns: the list of buckets and the choice. Must never: import jax. The list is short on purpose: every bucket is a
compiled program, and all of them are compiled before the first request.
"""

from __future__ import annotations

from collections.abc import Sequence

from hkv_jax.engine.batch_format import BatchFormat, Bucket
from hkv_jax.engine.plan import StepPlan

SMALLEST_PREFILL_TOKENS = 16


class Buckets:
    """All step shapes of an engine.

    Decode buckets (one token a row) have 1, 2, 4 … ``max_num_seqs`` rows; prefill buckets have 16, 32 …
    ``max_num_batched_tokens`` tokens over ``max_num_seqs`` rows. The last of each is the limit itself, a power of two
    or not.
    """

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int, block_sizes: Sequence[int]) -> None:
        """Buckets for these limits; ``block_sizes`` are those of the KV groups, in tokens.

        Raises:
            ValueError: a limit is below 1, or the step has not one token for every sequence.
        """
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ValueError(f"max_num_seqs {max_num_seqs} is not from 1 to the step's {max_num_batched_tokens} tokens")
        sizes = tuple(block_sizes)
        self.decode = tuple(BatchFormat(Bucket(n, n, False), sizes) for n in _powers_of_two(1, max_num_seqs))
        token_counts = _powers_of_two(SMALLEST_PREFILL_TOKENS, max_num_batched_tokens)
        self.prefill = tuple(BatchFormat(Bucket(n, max_num_seqs, True), sizes) for n in token_counts)

    @property
    def all(self) -> tuple[BatchFormat, ...]:
        """Every format, decode buckets first, each kind from small to large."""
        return self.decode + self.prefill

    def choose(self, plan: StepPlan, num_table_updates: Sequence[int] = ()) -> BatchFormat:
        """The smallest bucket that holds the plan (S3) and the table updates of each group.

        A plan of single-token rows runs in a decode bucket, also where a row is the last token of a prompt; only prompt
        logprobs need the prefill program for it.

        Raises:
            AssertionError: no bucket holds the plan; the scheduler broke a limit.
        """
        prefill = any(chunk.num_tokens > 1 or chunk.wants_prompt_logprobs for chunk in plan.chunks)
        num_tokens = plan.num_tokens
        for candidate in self.prefill if prefill else self.decode:
            holds = candidate.bucket.num_tokens >= num_tokens and candidate.bucket.num_rows >= plan.num_rows
            if holds and all(n <= candidate.max_table_updates(group) for group, n in enumerate(num_table_updates)):
                return candidate
        updates = f" and {tuple(num_table_updates)} table updates" if num_table_updates else ""
        raise AssertionError(f"S3: no bucket holds {plan.num_rows} rows of {num_tokens} tokens{updates}")


def _powers_of_two(first: int, limit: int) -> list[int]:
    """``first``, its doubles below ``limit``, and ``limit`` itself; only ``limit`` when it is below ``first``."""
    sizes = []
    size = first
    while size < limit:
        sizes.append(size)
        size *= 2
    return [*sizes, limit]
