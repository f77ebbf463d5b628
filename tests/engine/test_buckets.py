"""Which shapes a step may have, and which of them a plan takes."""

from __future__ import annotations

import numpy as np
import pytest

from hkv_jax.engine.batch_format import Bucket
from hkv_jax.engine.buckets import Buckets
from hkv_jax.engine.plan import Chunk, DecodeRows, StepPlan
from hkv_jax.engine.request import Request, Sequence
from hkv_jax.sampling_params import SamplingParams


def plan(num_decodes: int, chunks: tuple[int, ...] = (), prompt_logprobs: int | None = None) -> StepPlan:
    """``num_decodes`` decode rows and chunks of these lengths from the beginning of their prompts."""
    request = Request.create("r", [1] * 200, SamplingParams(prompt_logprobs=prompt_logprobs))
    sequences = [Sequence.create(request, 0, i, 300) for i in range(num_decodes + len(chunks))]
    lanes = np.arange(num_decodes, dtype=np.int32)
    decode = DecodeRows(tuple(sequences[:num_decodes]), lanes, lanes)
    parts = (Chunk(s, 0, length, samples=False) for s, length in zip(sequences[num_decodes:], chunks, strict=True))
    return StepPlan(decode, tuple(parts))


def test_the_limits_are_the_last_buckets() -> None:
    buckets = Buckets(6, 100, (8, 4))
    assert [each.bucket for each in buckets.decode] == [Bucket(n, n, False) for n in (1, 2, 4, 6)]
    assert [each.bucket for each in buckets.prefill] == [Bucket(n, 6, True) for n in (16, 32, 64, 100)]
    assert buckets.all == buckets.decode + buckets.prefill
    assert all(each.block_sizes == (8, 4) for each in buckets.all)


def test_powers_of_two_do_not_appear_twice() -> None:
    buckets = Buckets(4, 32, (8,))
    assert [each.bucket.num_rows for each in buckets.decode] == [1, 2, 4]
    assert [each.bucket.num_tokens for each in buckets.prefill] == [16, 32]


def test_a_small_budget_has_one_prefill_bucket() -> None:
    assert [each.bucket for each in Buckets(1, 5, (8,)).prefill] == [Bucket(5, 1, True)]


@pytest.mark.parametrize(("num_seqs", "num_tokens"), [(0, 4), (5, 4)])
def test_limits_that_make_no_sense_are_refused(num_seqs: int, num_tokens: int) -> None:
    with pytest.raises(ValueError, match="max_num_seqs"):
        Buckets(num_seqs, num_tokens, (8,))


@pytest.mark.parametrize(
    ("num_decodes", "chunks", "expected"),
    [
        (1, (), Bucket(1, 1, False)),
        (3, (), Bucket(4, 4, False)),
        (5, (), Bucket(6, 6, False)),
        (1, (1, 1), Bucket(4, 4, False)),
        (0, (2,), Bucket(16, 6, True)),
        (1, (16,), Bucket(32, 6, True)),
        (0, (100,), Bucket(100, 6, True)),
    ],
)
def test_the_smallest_that_fits_is_chosen(num_decodes: int, chunks: tuple[int, ...], expected: Bucket) -> None:
    assert Buckets(6, 100, (8, 4)).choose(plan(num_decodes, chunks)).bucket == expected


def test_prompt_logprobs_of_a_single_token_need_the_prefill_program() -> None:
    assert Buckets(6, 100, (8, 4)).choose(plan(0, (1,), prompt_logprobs=0)).bucket == Bucket(16, 6, True)


@pytest.mark.parametrize(("num_decodes", "chunks"), [(7, ()), (0, (101,)), (0, (2,) * 7)])
def test_a_plan_beyond_every_bucket_breaks_an_invariant(num_decodes: int, chunks: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="S3"):
        Buckets(6, 100, (8, 4)).choose(plan(num_decodes, chunks))
