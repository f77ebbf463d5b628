"""The loop: requests from any thread in, streams out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hkv_jax.engine.loop import EngineLoop, ServedModel
from hkv_jax.errors import OverloadedError, RequestError
from hkv_jax.outputs import Completion, FinishReason, RequestOutput, Usage
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.stepped_engine import SteppedEngine
from hkv_jax.testing.tiny_tokenizer import byte_level_tokenizer
from hkv_jax.tokenizer import Tokenizer

Opener = Callable[..., EngineLoop]

LIBRARY = byte_level_tokenizer()
VOCAB_SIZE = LIBRARY.get_vocab_size()
PROMPT = [5, 6, 7]
ENDLESS = SamplingParams(ignore_eos=True, seed=0)


def whole(output: RequestOutput) -> list[tuple[tuple[int, ...], str]]:
    return [(completion.token_ids, completion.text) for completion in output.outputs]


def tokens_until(completion: Completion, stop: str) -> tuple[int, ...]:
    """The tokens up to the one that completes ``stop``."""
    lengths = range(1, len(completion.token_ids) + 1)
    return next(ids for ids in (completion.token_ids[:length] for length in lengths) if stop in LIBRARY.decode(ids))


def test_a_stream_gives_what_the_result_gives(open_loop: Opener) -> None:
    loop = open_loop()
    params = SamplingParams(max_tokens=20, seed=1, n=2, logprobs=1, prompt_logprobs=0)
    output = loop.submit(PROMPT, params).result()
    deltas = list(loop.submit(PROMPT, params))
    for completion in output.outputs:
        pieces = [delta.completion for delta in deltas if delta.completion.sample == completion.sample]
        assert tuple(token_id for piece in pieces for token_id in piece.token_ids) == completion.token_ids
        assert "".join(piece.text for piece in pieces) == completion.text != ""
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert len(completion.logprobs or ()) == len(completion.token_ids)
    assert output.usage == deltas[-1].usage
    assert output.usage.completion_tokens == sum(len(completion.token_ids) for completion in output.outputs)
    assert deltas[0].prompt_logprobs == output.prompt_logprobs
    assert len(output.prompt_logprobs or ()) == len(PROMPT)


def test_requests_from_many_threads_all_end(open_loop: Opener) -> None:
    loop = open_loop()
    alone = whole(loop.submit(PROMPT, SamplingParams(max_tokens=9, seed=3)).result())
    outputs: list[RequestOutput] = []

    def client() -> None:
        outputs.append(loop.submit(PROMPT, SamplingParams(max_tokens=9, seed=3)).result())

    threads = [threading.Thread(target=client) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [whole(output) for output in outputs] == [alone] * 20
    stats = loop.stats()
    assert (stats.num_requests, stats.num_finished_requests, stats.num_added_requests) == (0, 21, 21)
    assert (stats.num_prompt_tokens, stats.num_output_tokens) == (21 * len(PROMPT), 21 * 9)


def test_the_loop_remembers_what_it_did(open_loop: Opener) -> None:
    loop = open_loop()
    assert [moment.seconds for moment in loop.history()] == [0]
    loop.submit(PROMPT, SamplingParams(max_tokens=9, ignore_eos=True)).result()
    moments = loop.history()
    times = [moment.seconds for moment in moments]
    assert times == sorted(times)
    assert [moment.stats.num_output_tokens for moment in moments] == [0, *range(10)]
    assert max(moment.stats.num_running for moment in moments) == 1
    assert any(pool.used_blocks for moment in moments for pool in moment.stats.pools)


def test_a_lagging_client_gets_one_large_delta(open_loop: Opener) -> None:
    stream = open_loop().submit(PROMPT, SamplingParams(max_tokens=50, ignore_eos=True))
    ended = threading.Event()
    stream.set_on_end(ended.set)
    ended.wait()
    deltas = list(stream)
    assert [len(delta.completion.token_ids) for delta in deltas] == [50]
    assert deltas[0].usage == Usage(len(PROMPT), 50)


def test_a_stop_string_ends_a_sample_and_frees_its_blocks(open_loop: Opener, stepped: SteppedEngine) -> None:
    """It is noticed some steps late; nothing of what was drawn meanwhile is seen."""
    reference = open_loop().submit(PROMPT, ENDLESS.replace(max_tokens=20)).result().outputs[0]
    stop = reference.text[4:7]
    expected = tokens_until(reference, stop)
    loop = open_loop(stepped)
    stream = loop.submit(PROMPT, ENDLESS.replace(stop=(stop,)))
    stepped.run(1 + len(expected))
    output = stream.result()
    (completion,) = output.outputs
    assert completion.text == reference.text[: reference.text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == (FinishReason.STOP, stop)
    assert completion.token_ids == expected
    assert output.usage.completion_tokens == len(expected) < 20
    stepped.run_freely()
    loop.close(drain=True)
    assert stepped.used_blocks == 0


def test_samples_stop_one_by_one(open_loop: Opener) -> None:
    loop = open_loop()
    params = ENDLESS.replace(n=3, max_tokens=30)
    texts = [completion.text for completion in loop.submit(PROMPT, params).result().outputs]
    stop = texts[1][5:8]
    assert stop not in texts[0] + texts[2]
    output = loop.submit(PROMPT, params.replace(stop=(stop,))).result()
    assert [completion.text for completion in output.outputs] == [texts[0], texts[1][: texts[1].index(stop)], texts[2]]
    assert output.usage.completion_tokens == sum(len(completion.token_ids) for completion in output.outputs)
    reasons = [completion.finish_reason for completion in output.outputs]
    assert reasons == [FinishReason.LENGTH, FinishReason.STOP, FinishReason.LENGTH]


@pytest.mark.parametrize("by", ["stream", "loop"])
def test_an_abort_frees_the_blocks_before_the_next_step(open_loop: Opener, stepped: SteppedEngine, by: str) -> None:
    loop = open_loop(stepped)
    stream = loop.submit(PROMPT, ENDLESS, request_id="r")
    stepped.run(4)
    assert stepped.used_blocks > 0
    if by == "loop":
        assert loop.abort("r")
    else:
        stream.abort()
    stepped.run(1)  # the step that the loop was in
    output = stream.result()
    assert output.outputs[0].finish_reason is FinishReason.ABORT
    assert output.usage.completion_tokens == len(output.outputs[0].token_ids)
    assert stepped.used_blocks == 0
    assert not loop.abort("r")


def test_an_abort_before_the_first_token(open_loop: Opener, stepped: SteppedEngine) -> None:
    stream = open_loop(stepped).submit(PROMPT, ENDLESS.replace(n=2, prompt_logprobs=0))
    stream.abort()
    stepped.run_freely()
    output = stream.result()
    assert whole(output) == [((), ""), ((), "")]
    assert output.usage == Usage(len(PROMPT), 0)


def test_a_deadline_aborts_within_one_step(open_loop: Opener, stepped: SteppedEngine) -> None:
    now = 100.0
    loop = open_loop(stepped, clock=lambda: now)
    late = loop.submit(PROMPT, ENDLESS, deadline=105.0)
    patient = loop.submit(PROMPT, ENDLESS.replace(max_tokens=12), deadline=1000.0)
    stepped.run(5)
    assert loop.stats().num_running == 2
    now = 105.0
    stepped.run(2)
    assert late.result().outputs[0].finish_reason is FinishReason.ABORT
    assert stepped.scheduler.num_running == 1
    stepped.run_freely()
    assert patient.result().outputs[0].finish_reason is FinishReason.LENGTH


def test_deadlines_of_ended_requests_do_not_pile_up(open_loop: Opener) -> None:
    loop = open_loop()
    for _ in range(200):
        loop.submit(PROMPT, SamplingParams(max_tokens=1), deadline=1e12).result()
    assert len(loop._deadlines) <= 70


def test_an_id_is_unique_among_the_living(open_loop: Opener, stepped: SteppedEngine) -> None:
    loop = open_loop(stepped)
    first = loop.submit(PROMPT, SamplingParams(max_tokens=2), request_id="r")
    with pytest.raises(RequestError, match="request_id 'r' is in use"):
        loop.submit(PROMPT, request_id="r")
    stepped.run_freely()
    first.result()
    assert loop.submit(PROMPT, SamplingParams(max_tokens=2), request_id="r").result().request_id == "r"


def test_an_id_can_be_used_again_as_soon_as_its_request_has_ended(open_loop: Opener) -> None:
    """Also after a stop string, of which the engine learns later than the client."""
    loop = open_loop()
    params = ENDLESS.replace(max_tokens=30)
    text = loop.submit(PROMPT, params).result().outputs[0].text
    for _ in range(50):
        output = loop.submit(PROMPT, params.replace(stop=(text[3:6],)), request_id="r").result()
        assert output.outputs[0].text == text[: text.index(text[3:6])]


def test_the_queue_is_bounded(open_loop: Opener, stepped: SteppedEngine) -> None:
    loop = open_loop(stepped, max_queue=2)
    streams = [loop.submit(PROMPT, SamplingParams(max_tokens=3)) for _ in range(2)]
    with pytest.raises(OverloadedError, match="2 requests wait, max_queue is 2"):
        loop.submit(PROMPT)
    streams.pop().abort()
    stepped.run(2)
    assert streams[0].get() is not None  # its first token: it waits no more
    streams += [loop.submit(PROMPT, SamplingParams(max_tokens=3)) for _ in range(2)]
    with pytest.raises(OverloadedError):
        loop.submit(PROMPT)
    stepped.run_freely()
    for stream in streams:
        list(stream)
    assert loop.submit(PROMPT, SamplingParams(max_tokens=3)).result()


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt has 0 tokens"),
        ([1] * 128, {}, "max_model_len 128 leaves room for at most 127"),
        ([VOCAB_SIZE], {}, "outside the vocabulary"),
        ([-1], {}, "outside 0 to"),
        (PROMPT, {"stop_token_ids": (VOCAB_SIZE,)}, "stop_token_ids is"),
        (PROMPT, {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias is"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(
    open_loop: Opener, prompt: list[int], params: dict[str, Any], message: str
) -> None:
    loop = open_loop()
    with pytest.raises(RequestError, match=message):
        loop.submit(prompt, SamplingParams(**params))
    assert loop.stats().num_requests == 0


def test_unset_fields_take_the_models_values(open_loop: Opener, model: ServedModel) -> None:
    defaults = {"max_tokens": 4, "seed": 9, "temperature": 0.5}
    loop = open_loop(model=ServedModel(model.tokenizer, (1,), defaults))
    output = loop.submit(PROMPT).result()
    assert output.usage.completion_tokens == 4
    assert whole(loop.submit(PROMPT, SamplingParams(max_tokens=4)).result()) == whole(output)
    assert loop.submit(PROMPT, SamplingParams(max_tokens=6)).result().usage.completion_tokens == 6


def test_a_model_without_a_tokenizer_serves_ids(open_loop: Opener, tmp_path: Path) -> None:
    loop = open_loop(model=ServedModel(Tokenizer.from_folder(tmp_path), ()))
    output = loop.submit(PROMPT, SamplingParams(max_tokens=4)).result()
    assert [len(ids) for ids, _ in whole(output)] == [4]
    assert output.outputs[0].text == ""
    with pytest.raises(RequestError, match="leave detokenize unset"):
        loop.submit(PROMPT, SamplingParams(detokenize=True))
    with pytest.raises(RequestError, match="stop is set and detokenize is false"):
        loop.submit(PROMPT, SamplingParams(stop=("x",)))


def test_prompts_and_tokens_never_reach_a_log(open_loop: Opener, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        open_loop().submit(PROMPT, SamplingParams(max_tokens=5)).result()
    assert not caplog.records
