"""Token ids of a trace are a pure function of segment and position."""

from __future__ import annotations

import numpy as np

from tools.cache_simulation.token_ids import VOCAB_SIZE, output_ids, prompt_ids, segment_ids
from tools.cache_simulation.trace import TraceRequest


def test_a_longer_segment_begins_like_a_shorter_one() -> None:
    assert np.array_equal(segment_ids("document", 1000)[:10], segment_ids("document", 10))


def test_ids_are_in_the_vocabulary_and_hardly_repeat() -> None:
    ids = segment_ids("document", 20_000)
    assert ids.dtype == np.int32
    assert ids.min() >= 0
    assert ids.max() < VOCAB_SIZE
    assert len(np.unique(ids)) > 19_990


def test_segments_begin_differently() -> None:
    first = {int(segment_ids(f"question{number}", 1)[0]) for number in range(1000)}
    assert len(first) == 1000


def test_a_later_turn_shares_the_answer_before_it() -> None:
    first = TraceRequest("a", 0.0, None, 0.0, (("system", 5), ("hello", 2)), 4)
    second = TraceRequest("b", 0.0, "a", 0.0, (("system", 5), ("hello", 2), ("out:a", 3), ("and", 1)), 4)
    prompt = prompt_ids(second)
    assert np.array_equal(prompt[:7], prompt_ids(first))
    assert np.array_equal(prompt[7:10], output_ids(first)[:3])
    assert len(prompt) == second.prompt_len
