"""Requests and sequences: what is refused, what ends them, which tokens they have."""

from __future__ import annotations

import numpy as np
import pytest

from hkv_jax.engine.request import Request, Sequence
from hkv_jax.errors import RequestError
from hkv_jax.sampling_params import SamplingParams


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="0 tokens"):
        Request.create("r", [], SamplingParams())


@pytest.mark.parametrize("bad", [-1, 2**31])
def test_ids_that_are_no_ids_are_refused_without_being_shown(bad: int) -> None:
    with pytest.raises(RequestError, match="outside 0") as caught:
        Request.create("r", [5, bad], SamplingParams())
    assert str(bad) not in str(caught.value).replace("2**31 - 1", "")


def test_the_models_stop_ids_count_unless_ignored() -> None:
    params = SamplingParams(stop_token_ids=(7, 2))
    assert Request.create("r", [1], params, (2, 3)).stop_ids == {2, 3, 7}
    ignoring = SamplingParams(stop_token_ids=(7,), ignore_eos=True)
    assert Request.create("r", [1], ignoring, (2, 3)).stop_ids == {7}


def test_a_missing_seed_is_drawn() -> None:
    seeds = {Request.create("r", [1], SamplingParams()).seed for _ in range(4)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_two_words_high_first() -> None:
    request = Request.create("r", [1], SamplingParams(seed=0x1234567890ABCDEF))
    assert request.seed_words == (0x12345678, 0x90ABCDEF)


@pytest.mark.parametrize(("max_tokens", "expected"), [(None, 7), (3, 3), (100, 7)])
def test_output_ends_at_max_tokens_or_max_model_len(max_tokens: int | None, expected: int) -> None:
    request = Request.create("r", [1, 2, 3], SamplingParams(max_tokens=max_tokens))
    sequence = Sequence.create(request, 0, 0, max_model_len=10)
    assert sequence.max_output_tokens == expected
    assert sequence.max_total_tokens == 3 + expected


def test_tokens_run_from_prompt_to_output() -> None:
    sequence = Sequence.create(Request.create("r", [10, 11, 12, 13], SamplingParams()), 0, 0, 20)
    sequence.output_token_ids += [14, 15, 16]
    everything = np.arange(10, 17)
    for start in range(7):
        for end in range(start + 1, 8):
            assert sequence.tokens(start, end).tolist() == everything[start:end].tolist()


def test_only_the_first_sample_collects_prompt_logprobs() -> None:
    request = Request.create("r", [4, 5], SamplingParams(prompt_logprobs=2, n=2))
    first, second = (Sequence.create(request, sample, 0, 20) for sample in range(2))
    assert first.wants_prompt_logprobs
    assert first.prompt_logprobs is not None
    assert [(entry.token_id, entry.logprob) for entry in first.prompt_logprobs] == [(4, None)]
    assert second.prompt_logprobs is None
    assert not second.wants_prompt_logprobs
