"""What the tokens of a step mean to the sequences that drew them."""

from __future__ import annotations

import numpy as np

from hkv_jax.engine.commit import commit_step
from hkv_jax.engine.plan import Chunk, DecodeRows, StepPlan
from hkv_jax.engine.request import Request, Sequence, SequenceState
from hkv_jax.engine.step_result import Logprobs, StepResult
from hkv_jax.outputs import FinishReason, TokenLogprob
from hkv_jax.sampling_params import SamplingParams

Finished = list[tuple[Sequence, FinishReason, int | None]]


def sequence(prompt: list[int], state: SequenceState = SequenceState.RUNNING, **params: object) -> Sequence:
    made = Sequence.create(Request.create("r", prompt, SamplingParams(**params)), 0, 0, 100)  # type: ignore[arg-type]
    made.state = state
    return made


def plan(decodes: list[Sequence], chunks: list[Chunk]) -> StepPlan:
    lanes = np.arange(len(decodes), dtype=np.int32)
    return StepPlan(DecodeRows(tuple(decodes), lanes, lanes), tuple(chunks))


def logprobs(count: int) -> Logprobs:
    """Entry i: chosen -i, top ids 100 i, 100 i + 1 …, logprobs -i, -i - 1 …"""
    rows, ranks = np.arange(count)[:, None], np.arange(20)
    return Logprobs(
        -np.arange(count, dtype=np.float32), (100 * rows + ranks).astype(np.int32), (-rows - ranks).astype(np.float32)
    )


def test_rows_that_draw_nothing_make_no_event() -> None:
    inside, ends = sequence([1] * 9), sequence([1] * 4)
    step = plan([], [Chunk(inside, 0, 5, samples=False), Chunk(ends, 0, 4, samples=True)])
    events = commit_step(step, StepResult(np.array([50, 51, 0, 0], np.int32)), lambda *_: None)
    assert [(event.sequence, event.token_id) for event in events] == [(ends, 51)]
    assert inside.output_token_ids == []


def test_the_finished_drop_their_token_and_the_preempted_take_it() -> None:
    over, back = sequence([1], SequenceState.FINISHED), sequence([1], SequenceState.WAITING)
    back.in_flight = 1
    events = commit_step(plan([over, back], []), StepResult(np.array([7, 8], np.int32)), lambda *_: None)
    assert [(event.sequence, event.token_id) for event in events] == [(back, 8)]
    assert (over.output_token_ids, back.output_token_ids, back.in_flight) == ([], [8], 0)


def test_a_stop_counts_before_length() -> None:
    finished: Finished = []
    both, length = sequence([1], max_tokens=1, stop_token_ids=(7,)), sequence([1], max_tokens=1)
    result = StepResult(np.array([7, 7], np.int32))
    events = commit_step(plan([both, length], []), result, lambda *end: finished.append(end))
    assert [(event.finish_reason, event.stop_reason) for event in events] == [
        (FinishReason.STOP, 7),
        (FinishReason.LENGTH, None),
    ]
    assert finished == [(both, FinishReason.STOP, 7), (length, FinishReason.LENGTH, None)]


def test_logprobs_go_to_those_who_asked() -> None:
    none, two, chunked = sequence([1]), sequence([1], logprobs=2), sequence([1, 2], logprobs=0)
    step = plan([none, two], [Chunk(chunked, 0, 2, samples=True)])
    events = commit_step(step, StepResult(np.array([5, 6, 7], np.int32), logprobs(3)), lambda *_: None)
    assert [event.logprob for event in events] == [
        None,
        TokenLogprob(6, -1.0, ((100, -1.0), (101, -2.0))),
        TokenLogprob(7, -2.0, ()),
    ]


def test_prompt_logprobs_come_chunk_by_chunk_and_once() -> None:
    asked = sequence([10, 11, 12, 13, 14], prompt_logprobs=1)
    other = sequence([1])
    expected = [TokenLogprob(10, None)]

    def run(start: int, end: int, *, samples: bool) -> tuple[TokenLogprob, ...] | None:
        step = plan([other], [Chunk(asked, start, end, samples)])
        result = StepResult(np.array([3, 4], np.int32), None, logprobs(1 + end - start))
        events = commit_step(step, result, lambda *_: None)
        return events[-1].prompt_logprobs

    assert run(0, 2, samples=False) is None
    expected += [TokenLogprob(11, -1.0, ((100, -1.0),)), TokenLogprob(12, -2.0, ((200, -2.0),))]
    assert asked.prompt_logprobs == expected
    # Preempted: the prompt is computed again from its beginning, and known entries stay as they are.
    assert run(0, 4, samples=False) is None
    expected += [TokenLogprob(13, -3.0, ((300, -3.0),)), TokenLogprob(14, -4.0, ((400, -4.0),))]
    assert asked.prompt_logprobs == expected
    assert run(4, 5, samples=True) == tuple(expected)
    assert run(5, 6, samples=True) is None, "they come with the first token only"


def test_a_prompt_of_one_token_has_its_one_entry() -> None:
    asked = sequence([10], prompt_logprobs=3)
    step = plan([], [Chunk(asked, 0, 1, samples=True)])
    (event,) = commit_step(step, StepResult(np.array([3], np.int32)), lambda *_: None)
    assert event.prompt_logprobs == (TokenLogprob(10, None),)
