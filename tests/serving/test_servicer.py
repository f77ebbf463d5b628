"""What a client sees of requests: answers, refusals, and what ends them early."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from hkv_jax.engine.loop import EngineLoop
from hkv_jax.errors import EngineStoppedError, OverloadedError, RequestError
from hkv_jax.outputs import FinishReason
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.tokenizer import Tokenizer
from serving.proto import hkv_inference_pb2 as pb
from serving.proto import hkv_inference_pb2_grpc as pb_grpc
from serving.testing import FOREVER, LIMITS, endless, fake_service, run


def test_unary_is_the_joined_stream(tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=40, seed=7, n=2, logprobs=2, prompt_logprobs=1)

    async def body() -> None:
        async with fake_service(tokenizer) as it:
            whole = await it.client.generate("hello the world", params)
            deltas = [delta async for delta in it.client.generate_stream("hello the world", params)]
        for output in whole.outputs:
            mine = [delta.completion for delta in deltas if delta.completion.sample == output.sample]
            assert "".join(piece.text for piece in mine) == output.text
            assert tuple(i for piece in mine for i in piece.token_ids) == output.token_ids
            assert tuple(i for piece in mine for i in piece.logprobs or ()) == output.logprobs
            assert [piece.finish_reason for piece in mine[:-1]] == [None] * (len(mine) - 1)
            assert mine[-1].finish_reason is output.finish_reason is not None
            assert mine[-1].stop_reason == output.stop_reason
            assert all(piece.token_ids for piece in mine)
        assert [output.sample for output in whole.outputs] == [0, 1]
        assert deltas[0].prompt_logprobs == whole.prompt_logprobs
        assert whole.prompt_logprobs is not None
        assert whole.prompt_logprobs[0].logprob is None
        assert whole.prompt_logprobs[1].logprob is not None
        assert deltas[-1].usage == whole.usage
        assert [delta for delta in deltas[:-1] if delta.usage is not None] == []
        assert whole.usage.completion_tokens == sum(len(output.token_ids) for output in whole.outputs)

    run(body)


def test_both_spellings_of_a_prompt_and_both_kinds_of_stop(tokenizer: Tokenizer) -> None:
    async def body() -> None:
        async with fake_service(tokenizer) as it:
            by_text = await it.client.generate("the cat", FOREVER.replace(max_tokens=12))
            by_ids = await it.client.generate(tokenizer.encode("the cat"), FOREVER.replace(max_tokens=12))
            assert by_text.outputs == by_ids.outputs
            assert by_text.outputs[0].finish_reason is FinishReason.LENGTH
            assert by_text.outputs[0].stop_reason is None
            ids = by_text.outputs[0].token_ids
            stopped = await it.client.generate("the cat", FOREVER.replace(max_tokens=12, stop_token_ids=(ids[3],)))
            assert stopped.outputs[0].token_ids == ids[: ids.index(ids[3]) + 1]
            assert stopped.outputs[0].finish_reason is FinishReason.STOP
            assert stopped.outputs[0].stop_reason == ids[3]
            text = by_text.outputs[0].text
            cut = await it.client.generate("the cat", FOREVER.replace(max_tokens=12, stop=(text[2:4],)))
            assert cut.outputs[0].text == text[: text.index(text[2:4])]
            assert cut.outputs[0].stop_reason == text[2:4]

    run(body)


def test_a_client_that_lags_gets_fewer_larger_chunks(tokenizer: Tokenizer) -> None:
    async def body() -> None:
        async with fake_service(tokenizer) as it:
            stream = it.client.generate_stream("hello", FOREVER.replace(max_tokens=1000))
            first = await anext(stream)
            while not it.engine.stats().num_finished_requests:
                time.sleep(0.001)  # on purpose: neither end of the connection gets a turn meanwhile
            rest = [delta async for delta in stream]
            assert len(rest) < 200
            assert sum(len(delta.completion.token_ids) for delta in (first, *rest)) == 1000

    run(body)


def test_leaving_a_stream_frees_its_blocks(tokenizer: Tokenizer) -> None:
    async def body() -> None:
        async with fake_service(tokenizer) as it:
            stream = it.client.generate_stream("hello", FOREVER)
            await anext(stream)
            await it.until(lambda: it.used_blocks > 0)
            await stream.aclose()
            await it.until(lambda: it.used_blocks == 0)
            stats = it.engine.stats()
            assert stats.num_requests == 0
            assert stats.num_output_tokens < LIMITS.max_model_len - 100

    run(body)


def test_a_cancelled_unary_call_frees_its_blocks(tokenizer: Tokenizer) -> None:
    async def body() -> None:
        async with fake_service(tokenizer) as it:
            call = asyncio.ensure_future(it.client.generate("hello", FOREVER))
            await it.until(lambda: it.used_blocks > 0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await it.until(lambda: it.used_blocks == 0)
            assert it.engine.stats().num_output_tokens < LIMITS.max_model_len - 100

    run(body)


@pytest.mark.parametrize("stop_reading", [False, True])
def test_a_deadline_frees_the_blocks_and_says_so(tokenizer: Tokenizer, stop_reading: bool) -> None:
    async def body() -> None:
        async with fake_service(tokenizer) as it, grpc.aio.insecure_channel(it.address) as channel:
            stub = pb_grpc.InferenceStub(channel)
            requests = [stub.GenerateStream(endless(), timeout=0.3) for _ in range(4)]
            if stop_reading:  # nobody takes anything from the call; the server must notice all the same
                await it.until(lambda: it.used_blocks > 0)
            else:
                for request in requests:
                    with pytest.raises(grpc.aio.AioRpcError) as failure:
                        async for _ in request:
                            pass
                    assert failure.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await it.until(lambda: it.used_blocks == 0 and it.engine.stats().num_requests == 0)
            with pytest.raises(TimeoutError):
                await it.client.generate("hello", FOREVER.replace(n=8), timeout=0.05)

    run(body)


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (pb.GenerateRequest(), "prompt is missing"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids is empty"),
        (pb.GenerateRequest(text="a", request_id="x" * 129), "request_id has 129 bytes"),
        (pb.GenerateRequest(text="a", request_id="a\nb"), "request_id has characters"),
        (pb.GenerateRequest(text="a", sampling=pb.SamplingParams(temperature=-1)), "temperature is -1.0"),
        (pb.GenerateRequest(text="a", sampling=pb.SamplingParams(temperature=float("nan"))), "temperature is nan"),
        (pb.GenerateRequest(text="a", sampling=pb.SamplingParams(top_p=0)), "top_p is 0.0"),
        (pb.GenerateRequest(text="a", sampling=pb.SamplingParams(max_tokens=0)), "max_tokens is 0"),
        (pb.GenerateRequest(text="a", sampling=pb.SamplingParams(n=65)), "n is 65"),
        (pb.GenerateRequest(text="a", sampling=pb.SamplingParams(seed=2**63)), "seed is"),
        (pb.GenerateRequest(text="a", sampling=pb.SamplingParams(stop=["ok", ""])), "stop is ''"),
        (pb.GenerateRequest(text="a", sampling=pb.SamplingParams(logit_bias={300: 1.0})), "logit_bias is 300"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 300])), "0 to 299"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 4096)), "max_model_len"),
    ],
)
def test_bad_requests_are_refused_with_a_reason(tokenizer: Tokenizer, message: pb.GenerateRequest, what: str) -> None:
    async def body() -> None:
        async with fake_service(tokenizer) as it, grpc.aio.insecure_channel(it.address) as channel:
            stub = pb_grpc.InferenceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as unary:
                await stub.Generate(message)
            with pytest.raises(grpc.aio.AioRpcError) as streamed:
                await stub.GenerateStream(message).read()
            for failure in (unary.value, streamed.value):
                assert failure.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert what in (failure.details() or "")
            assert it.engine.stats().num_added_requests == 0

    run(body)


def test_an_unset_field_has_the_models_value_and_zero_is_a_value(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[SamplingParams] = []
    submit = EngineLoop.submit

    def spy(self: EngineLoop, prompt: object, params: SamplingParams, **rest: object) -> object:
        seen.append(self.model.resolve(params))
        return submit(self, prompt, params, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(EngineLoop, "submit", spy)

    async def body() -> None:
        async with fake_service(tokenizer) as it:
            await it.client.generate("the", SamplingParams(max_tokens=1))
            given = SamplingParams(
                max_tokens=1, top_k=0, temperature=0, logprobs=0, stop=("x",), stop_token_ids=(3,), logit_bias={4: -1.5}
            )
            await it.client.generate("the", given)
        assert seen[0] == SamplingParams(max_tokens=1, top_k=5)
        assert seen[1] == given

    run(body)


def test_errors_have_their_status(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with fake_service(tokenizer, max_queue=0) as it:
            with pytest.raises(OverloadedError, match="max_queue is 0"):
                await it.client.generate("the", FOREVER)
            it.engine.close()
            with pytest.raises(EngineStoppedError, match="takes no more requests"):
                await it.client.generate("the", FOREVER)

    run(body)


def test_an_unexpected_error_tells_an_id_and_nothing_else(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret prompt")

    async def body() -> str:
        async with fake_service(tokenizer) as it:
            monkeypatch.setattr(it.engine, "submit", broken)
            with pytest.raises(grpc.RpcError) as failure:
                await it.client.generate("the", FOREVER)
            assert failure.value.code() == grpc.StatusCode.INTERNAL
            return str(failure.value.details())

    details = run(body)
    assert "secret" not in details
    assert details.startswith("internal error ")
    assert details in caplog.text
    assert "secret prompt" in caplog.text


def test_a_request_id_is_kept_made_up_and_unique_among_the_living(tokenizer: Tokenizer) -> None:
    async def body() -> None:
        async with fake_service(tokenizer) as it:
            short = FOREVER.replace(max_tokens=1)
            assert (await it.client.generate("the", short)).request_id != ""
            assert (await it.client.generate("the", short, request_id="mine")).request_id == "mine"
            stream = it.client.generate_stream("the", FOREVER, request_id="mine")
            assert (await anext(stream)).request_id == "mine"
            with pytest.raises(RequestError, match="in use"):
                await it.client.generate("the", short, request_id="mine")
            # The one refused must not take the living one with it.
            assert (await anext(stream)).completion.finish_reason is None
            await stream.aclose()

    run(body)
