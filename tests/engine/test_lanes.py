"""Lanes: who has which, and the parameters of each in arrays."""

from __future__ import annotations

import numpy as np
import pytest

from hkv_jax.engine.lanes import FLOAT_FIELDS, Lanes
from hkv_jax.engine.request import NO_LANE, Request, Sequence
from hkv_jax.sampling_params import SamplingParams


def sequence(params: SamplingParams, prompt_len: int = 3, sample: int = 0) -> Sequence:
    return Sequence.create(Request.create("r", [1] * prompt_len, params), sample, 0, 100)


def test_the_lowest_free_lane_is_given() -> None:
    lanes = Lanes(3)
    members = [sequence(SamplingParams()) for _ in range(3)]
    assert [lanes.open(member, 0) for member in members] == [0, 1, 2]
    assert lanes.num_free == 0
    assert lanes.close(members[1]) == 1
    assert lanes.close(members[0]) == 0
    assert members[0].lane == NO_LANE
    assert lanes.num_running == 1
    assert lanes.running() == [members[2]]
    assert lanes.open(members[1], 0) == 0


def test_parameters_lie_where_the_step_looks_for_them() -> None:
    params = SamplingParams(
        seed=(3 << 32) + 2**32 - 1, max_tokens=9, min_tokens=4, top_k=5, logprobs=2, n=3, temperature=0.5, top_p=0.25,
        min_p=0.125, repetition_penalty=1.5, presence_penalty=-1.0, frequency_penalty=2.0,
    )  # fmt: skip
    lanes = Lanes(2)
    lanes.open(sequence(SamplingParams()), 0)
    lane = lanes.open(sequence(params, prompt_len=7, sample=2), 6)
    assert lanes.positions[lane] == 6
    assert lanes.limits[lane] == 7 + 9 - 1
    assert lanes.prompt_lens[lane] == 7
    assert lanes.min_tokens[lane] == 4
    assert lanes.samples[lane] == 2
    assert lanes.top_k[lane] == 5
    assert lanes.num_logprobs[lane] == 3
    assert lanes.seeds[lane].view(np.uint32).tolist() == [3, 2**32 - 1]
    assert lanes.floats[:, lane].tolist() == [getattr(params, field) for field in FLOAT_FIELDS]


def test_no_logprobs_and_none_beside_the_chosen_differ() -> None:
    lanes = Lanes(2)
    assert lanes.num_logprobs[lanes.open(sequence(SamplingParams()), 0)] == 0
    assert lanes.num_logprobs[lanes.open(sequence(SamplingParams(logprobs=0)), 0)] == 1


def test_a_top_k_beyond_i32_is_all() -> None:
    lanes = Lanes(1)
    assert lanes.top_k[lanes.open(sequence(SamplingParams(top_k=2**40)), 0)] == 2**31 - 1


def test_decode_rows_follow_every_change() -> None:
    lanes = Lanes(3)
    members = [sequence(SamplingParams()) for _ in range(3)]
    for member in members:
        lanes.open(member, 0)
    assert lanes.decode_rows()[0].tolist() == []
    lanes.set_decoding(2, True)
    lanes.set_decoding(0, True)
    rows, sequences = lanes.decode_rows()
    assert rows.tolist() == [0, 2]
    assert sequences == (members[0], members[2])
    assert lanes.decode_rows()[0] is rows
    lanes.close(members[0])
    assert lanes.decode_rows()[0].tolist() == [2]


def test_a_lane_is_given_up_by_its_owner_only() -> None:
    lanes = Lanes(2)
    owner, other = sequence(SamplingParams()), sequence(SamplingParams())
    lanes.open(owner, 0)
    other.lane = 0
    with pytest.raises(AssertionError, match="another"):
        lanes.close(other)
