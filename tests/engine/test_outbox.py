"""The buffer of one request: merged while nobody reads, read without loss, ended once."""

from __future__ import annotations

import threading

import pytest

from hkv_jax.engine.outbox import Outbox, RequestStream
from hkv_jax.engine.request import Request
from hkv_jax.errors import InternalError
from hkv_jax.outputs import Completion, FinishReason, StreamDelta, TokenLogprob, Usage
from hkv_jax.sampling_params import SamplingParams

USAGE = Usage(3, 4)


def piece(sample: int, token_id: int, reason: FinishReason | None = None) -> Completion:
    logprobs = (TokenLogprob(token_id, -1.0),)
    return Completion(sample, f"<{token_id}>", (token_id,), logprobs, reason, token_id if reason else None)


def open_stream(**params: int) -> tuple[Outbox, RequestStream]:
    request = Request.create("r", [1, 2, 3], SamplingParams(**params))  # type: ignore[arg-type]
    outbox = Outbox(request)
    return outbox, RequestStream(request, outbox, lambda: None)


def test_what_comes_while_nobody_reads_is_one_delta() -> None:
    outbox, stream = open_stream()
    outbox.put(piece(0, 5))
    assert stream.poll() == StreamDelta("r", piece(0, 5))
    for token_id in (6, 7):
        outbox.put(piece(0, token_id))
    outbox.put(piece(0, 8, FinishReason.STOP), None, USAGE)
    logprobs = tuple(TokenLogprob(token_id, -1.0) for token_id in (6, 7, 8))
    merged = Completion(0, "<6><7><8>", (6, 7, 8), logprobs, FinishReason.STOP, 8)
    ended = [stream.ended]
    assert stream.poll() == StreamDelta("r", merged, None, USAGE)
    ended.append(stream.ended)
    assert ended == [False, True]
    assert stream.poll() is None
    assert stream.get() is None


def test_usage_comes_with_the_last_delta_whichever_sample_it_is_of() -> None:
    outbox, stream = open_stream(n=2)
    outbox.put(piece(1, 5))
    outbox.put(piece(0, 6, FinishReason.LENGTH))
    outbox.put(piece(1, 7, FinishReason.LENGTH), None, USAGE)
    deltas = list(stream)
    assert [(delta.completion.sample, delta.completion.token_ids) for delta in deltas] == [(1, (5, 7)), (0, (6,))]
    assert [delta.usage for delta in deltas] == [None, USAGE]


def test_the_first_delta_waits_for_prompt_logprobs_and_brings_them() -> None:
    outbox, stream = open_stream(n=2, prompt_logprobs=0)
    entries = (TokenLogprob(1, None), TokenLogprob(2, -1.0))
    outbox.put(piece(1, 5))
    assert stream.poll() is None
    outbox.put(piece(0, 6), entries)
    first, second = stream.poll(), stream.poll()
    assert first is not None
    assert second is not None
    assert first.prompt_logprobs == entries
    assert second.prompt_logprobs is None


def test_a_request_that_ends_before_its_prompt_logprobs_can_be_read() -> None:
    outbox, stream = open_stream(prompt_logprobs=0)
    outbox.put(piece(0, 6, FinishReason.ABORT), None, USAGE)
    assert [delta.prompt_logprobs for delta in stream] == [None]


def test_an_error_comes_after_what_was_not_read_and_again_and_again() -> None:
    outbox, stream = open_stream()
    outbox.put(piece(0, 5))
    outbox.fail(InternalError("1234"))
    outbox.fail(ValueError("a later error changes nothing"))
    outbox.put(piece(0, 6))
    assert stream.poll() == StreamDelta("r", piece(0, 5))
    for read in (stream.poll, stream.get, stream.result):
        with pytest.raises(InternalError, match="internal error 1234"):
            read()
    assert not stream.ended


def test_nothing_follows_the_end() -> None:
    outbox, stream = open_stream()
    outbox.put(piece(0, 5, FinishReason.STOP), None, USAGE)
    outbox.put(piece(0, 6))
    outbox.fail(InternalError("1234"))
    assert stream.result().outputs == (piece(0, 5, FinishReason.STOP),)


def test_get_gives_up_in_time() -> None:
    with pytest.raises(TimeoutError):
        open_stream()[1].get(timeout=0)


def test_get_waits_for_the_other_thread() -> None:
    outbox, stream = open_stream()
    seen: list[StreamDelta | None] = []
    reader = threading.Thread(target=lambda: seen.extend((stream.get(), stream.get())))
    reader.start()
    outbox.put(piece(0, 5, FinishReason.STOP), None, USAGE)
    reader.join()
    assert seen == [StreamDelta("r", piece(0, 5, FinishReason.STOP), None, USAGE), None]


def test_on_ready_is_called_when_there_is_something_again_and_at_the_end() -> None:
    outbox, stream = open_stream()
    calls: list[int] = []
    stream.set_on_ready(lambda: calls.append(1))
    assert len(calls) == 0
    outbox.put(piece(0, 5))
    outbox.put(piece(0, 6))
    assert len(calls) == 1
    stream.poll()
    outbox.put(piece(0, 7))
    assert len(calls) == 2
    outbox.put(piece(0, 8, FinishReason.STOP), None, USAGE)
    assert len(calls) == 3
    stream.set_on_ready(lambda: calls.append(1))
    assert len(calls) == 4


def test_on_end_is_called_once_at_the_end() -> None:
    outbox, stream = open_stream()
    calls: list[int] = []
    stream.set_on_end(lambda: calls.append(1))
    outbox.put(piece(0, 5))
    assert len(calls) == 0
    outbox.fail(InternalError("1234"))
    assert len(calls) == 1
    stream.set_on_end(lambda: calls.append(1))
    assert len(calls) == 2


def test_result_is_all_samples_in_order() -> None:
    outbox, stream = open_stream(n=2, prompt_logprobs=0)
    entries = (TokenLogprob(1, None),)
    outbox.put(piece(1, 5))
    outbox.put(piece(0, 6), entries)
    outbox.put(piece(1, 7, FinishReason.LENGTH))
    outbox.put(piece(0, 8, FinishReason.STOP), None, USAGE)
    output = stream.result()
    assert [completion.sample for completion in output.outputs] == [0, 1]
    assert [completion.token_ids for completion in output.outputs] == [(6, 8), (5, 7)]
    assert (output.prompt_token_ids, output.usage, output.prompt_logprobs) == ((1, 2, 3), USAGE, entries)


def test_abort_is_for_requests_that_live() -> None:
    calls: list[int] = []
    request = Request.create("r", [1], SamplingParams())
    outbox = Outbox(request)
    stream = RequestStream(request, outbox, lambda: calls.append(1))
    stream.abort()
    outbox.put(piece(0, 5, FinishReason.ABORT), None, USAGE)
    stream.abort()
    assert calls == [1]
