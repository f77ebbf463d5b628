"""Generated traces are traces, depend on the seed alone, and look like what they are called."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tools.cache_simulation.generators import GENERATORS, alternating, chat, documents
from tools.cache_simulation.trace import parse_trace


@pytest.mark.parametrize("kind", GENERATORS)
def test_the_same_seed_gives_the_same_trace_and_it_can_be_read(kind: str) -> None:
    requests = GENERATORS[kind](5)
    assert parse_trace([request.to_json() for request in requests], kind) == requests
    assert GENERATORS[kind](5) == requests


@pytest.mark.parametrize("kind", GENERATORS)
def test_traces_of_two_seeds_share_no_segment(kind: str) -> None:
    first, second = ({name for request in GENERATORS[kind](seed) for name, _ in request.segments} for seed in (1, 2))
    assert not first & second


def test_a_turn_of_a_chat_begins_with_all_that_was_said() -> None:
    requests = {request.request_id: request for request in chat(3)}
    turns = [request for request in requests.values() if request.after is not None]
    assert len(turns) > 400
    for turn in turns:
        assert turn.after is not None
        before = requests[turn.after]
        said = (*before.segments, (f"out:{before.request_id}", before.output_len))
        assert turn.segments[:-1] == said
    assert 5 < np.mean([turn.think for turn in turns]) < 15
    assert len({request.segments[0] for request in requests.values()}) == 4


def test_questions_to_popular_documents_come_more_often() -> None:
    requests = documents(3)
    counts: dict[object, int] = {}
    for request in requests:
        counts[request.segments[:2]] = counts.get(request.segments[:2], 0) + 1
        assert 16_384 <= request.segments[1][1] < 65_536
        assert request.prompt_len + request.output_len <= 65_536
    assert max(counts.values()) > 30
    assert 8 <= len(counts) <= 16


def test_chats_and_documents_take_turns() -> None:
    requests = alternating(3)
    for request in requests:
        moment = request.arrival % 200
        assert (moment < 40) if request.request_id.startswith("chat") else (moment >= 100)
    kinds = [request.request_id.startswith("chat") for request in requests]
    assert sum(a != b for a, b in itertools.pairwise(kinds)) == 5
    assert [request.arrival for request in requests] == sorted(request.arrival for request in requests)


def test_long_and_short_prompts_are_long_and_short() -> None:
    longest = [request.prompt_len for request in GENERATORS["longctx"](3)]
    short = [request.prompt_len for request in GENERATORS["sharegpt"](3)]
    some_long = [request.prompt_len for request in GENERATORS["mixed"](3)]
    assert min(longest) >= 8192
    assert max(longest) <= 131_072
    assert max(short) <= 4096
    assert np.median(short) < 200
    assert 0.05 < np.mean([length >= 8192 for length in some_long]) < 0.15
