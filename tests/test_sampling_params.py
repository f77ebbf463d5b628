"""Sampling parameters: every range and its message, and which fields were set."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest

from hkv_jax import SamplingParams
from hkv_jax.errors import RequestError

INFINITY, NAN = float("inf"), float("nan")

REFUSED = [
    # field, value, what the message says is allowed
    ("max_tokens", 0, "an integer, at least 1"),
    ("max_tokens", 1.5, "an integer, at least 1"),
    ("max_tokens", True, "an integer, at least 1"),
    ("min_tokens", -1, "an integer, at least 0"),
    ("temperature", -0.1, "a finite number, at least 0"),
    ("temperature", INFINITY, "a finite number, at least 0"),
    ("temperature", NAN, "a finite number, at least 0"),
    ("temperature", "1", "a finite number, at least 0"),
    ("temperature", None, "a finite number, at least 0"),
    ("top_k", -1, "an integer, at least 0"),
    ("top_p", 0, "a number above 0, at most 1"),
    ("top_p", 1.01, "a number above 0, at most 1"),
    ("min_p", -0.01, "a number from 0 to 1"),
    ("min_p", 1.01, "a number from 0 to 1"),
    ("repetition_penalty", 0, "a finite number above 0"),
    ("repetition_penalty", INFINITY, "a finite number above 0"),
    ("presence_penalty", 2.01, "a number from -2 to 2"),
    ("presence_penalty", -2.01, "a number from -2 to 2"),
    ("frequency_penalty", 2.01, "a number from -2 to 2"),
    ("frequency_penalty", NAN, "a number from -2 to 2"),
    ("seed", -1, f"an integer from 0 to {2**63 - 1}"),
    ("seed", 2**63, f"an integer from 0 to {2**63 - 1}"),
    ("n", 0, "an integer from 1 to 64"),
    ("n", 65, "an integer from 1 to 64"),
    ("logprobs", -1, "an integer from 0 to 20"),
    ("logprobs", 21, "an integer from 0 to 20"),
    ("logprobs", True, "an integer from 0 to 20"),
    ("prompt_logprobs", -1, "an integer from 0 to 20"),
    ("prompt_logprobs", 21, "an integer from 0 to 20"),
    ("stop", [""], "non-empty strings"),
    ("stop", [1], "non-empty strings"),
    ("stop", ["x"] * 17, "at most 16 strings"),
    ("stop", ["x" * 1025], "strings of at most 1024 characters"),
    ("stop_token_ids", [-1], "an integer, at least 0"),
    ("stop_token_ids", ["x"], "an integer, at least 0"),
    ("stop_token_ids", [1] * 129, "at most 128 ids"),
    ("logit_bias", {-1: 0.0}, "an integer, at least 0"),
    ("logit_bias", {"1": 0.0}, "an integer, at least 0"),
    ("logit_bias", {1: 100.5}, "numbers from -100 to 100"),
    ("logit_bias", {1: NAN}, "numbers from -100 to 100"),
    ("logit_bias", dict.fromkeys(range(301), 0.0), "at most 300 entries"),
]

ACCEPTED = [
    *(("max_tokens", value) for value in (None, 1, 10**9)),
    *(("temperature", value) for value in (0, 0.0, 1e-6, 100)),
    *(("top_k", value) for value in (0, 1, 10**9)),
    *(("top_p", value) for value in (1e-6, 1)),
    *(("min_p", value) for value in (0, 1)),
    *(("repetition_penalty", value) for value in (1e-6, 100)),
    *(("presence_penalty", value) for value in (-2, 2)),
    *(("frequency_penalty", value) for value in (-2.0, 2.0)),
    *(("seed", value) for value in (None, 0, 2**63 - 1)),
    *(("n", value) for value in (1, 64)),
    *(("logprobs", value) for value in (None, 0, 20)),
    *(("prompt_logprobs", value) for value in (None, 0, 20)),
    ("stop", ["x" * 1024] * 16),
    ("stop_token_ids", [0] * 128),
    ("logit_bias", dict.fromkeys(range(300), 100.0)),
]


@pytest.mark.parametrize(("field", "value", "allowed"), REFUSED)
def test_a_value_out_of_range_is_refused_by_name_and_range(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(RequestError, match=f"^{field} is .*; allowed: {re.escape(allowed)}$"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(("field", "value"), ACCEPTED)
def test_the_ends_of_a_range_are_in_it(field: str, value: Any) -> None:
    SamplingParams(**{field: value})


def test_min_tokens_reach_up_to_max_tokens() -> None:
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    with pytest.raises(RequestError, match="min_tokens is 6; allowed: an integer from 0 to 5"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_stop_strings_need_text() -> None:
    with pytest.raises(RequestError, match="stop is set and detokenize is false"):
        SamplingParams(stop=("x",), detokenize=False)


def test_sequences_are_kept_as_the_params_own() -> None:
    ids, bias = [1, 2], {3: 1.0}
    params = SamplingParams(stop="end", stop_token_ids=ids, logit_bias=bias)  # type: ignore[arg-type]
    ids.append(9)
    bias[9] = 9.0
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("end",), (1, 2), {3: 1.0})
    nothing: Any = None
    assert SamplingParams(stop=nothing, stop_token_ids=nothing, logit_bias=nothing) == SamplingParams()


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids"])
def test_ids_must_be_in_the_vocabulary(field: str) -> None:
    values: dict[str, Any] = {"logit_bias": {9: 1.0}, "stop_token_ids": (9,)}
    params = SamplingParams(**{field: values[field]})
    params.check_for_model(10)
    with pytest.raises(RequestError, match=f"{field} is 9; allowed: ids are 0 to 8"):
        params.check_for_model(9)


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1)  # type: ignore[call-arg]


def test_unset_fields_take_the_models_values_and_set_ones_keep_theirs() -> None:
    model = {"temperature": 0.6, "top_k": 64, "top_p": 0.95}
    params = SamplingParams(temperature=1.0, max_tokens=3).with_defaults(model)
    assert params == SamplingParams(temperature=1.0, max_tokens=3, top_k=64, top_p=0.95)
    assert SamplingParams().with_defaults({}) == SamplingParams()


def test_the_first_default_counts() -> None:
    assert SamplingParams().with_defaults({"top_k": 1}).with_defaults({"top_k": 2}).top_k == 1


def test_a_default_out_of_range_is_refused() -> None:
    with pytest.raises(RequestError, match="top_p"):
        SamplingParams(min_tokens=9).with_defaults({"top_p": 2.0})


def test_a_copy_remembers_what_is_set() -> None:
    params = SamplingParams(temperature=0.5)
    assert params.set_fields == {"temperature"}
    assert params.replace(top_k=3).set_fields == {"temperature", "top_k"}
    assert params.replace(temperature=0.7) == SamplingParams(temperature=0.7)
    for twin in (copy.copy(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert twin == params
        assert twin.set_fields == {"temperature"}


def test_what_is_set_makes_no_difference_to_equality() -> None:
    assert SamplingParams(temperature=1.0) == SamplingParams()


def test_a_models_limit_gives_way_to_what_was_asked_for() -> None:
    params = SamplingParams(min_tokens=30).with_defaults({"max_tokens": 20})
    assert (params.min_tokens, params.max_tokens) == (30, 30)
