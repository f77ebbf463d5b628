"""The blocking client against a server in another thread; the one for asyncio is what the service's own tests use."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from hkv_jax.errors import EngineStoppedError, RequestError
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.tokenizer import Tokenizer
from serving.client import InferenceClient
from serving.testing import FakeService, fake_service

PARAMS = SamplingParams(max_tokens=20, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def service(tokenizer: Tokenizer) -> Iterator[FakeService]:
    began = threading.Event()
    running: list[FakeService] = []
    loop = asyncio.new_event_loop()
    end = asyncio.Event()

    async def serve() -> None:
        async with fake_service(tokenizer) as it:
            running.append(it)
            began.set()
            await end.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert began.wait(20)
    yield running[0]
    loop.call_soon_threadsafe(end.set)
    thread.join(20)
    loop.close()


def test_generate_and_stream_agree(service: FakeService) -> None:
    with InferenceClient(service.address) as client:
        client.wait_ready(timeout=20)
        whole = client.generate("the cat", PARAMS)
        deltas = list(client.generate_stream("the cat", PARAMS))
    assert "".join(delta.completion.text for delta in deltas) == whole.outputs[0].text
    assert deltas[-1].usage == whole.usage


def test_errors_are_exceptions_of_the_core(service: FakeService) -> None:
    with InferenceClient(service.address) as client:
        with pytest.raises(RequestError, match="token_ids is empty"):
            client.generate([])
        with pytest.raises(RequestError, match="token_ids is empty"):
            next(client.generate_stream([]))


def test_closing_a_stream_ends_its_request(service: FakeService) -> None:
    with InferenceClient(service.address) as client:
        stream = client.generate_stream("the cat", PARAMS.replace(max_tokens=4000))
        next(stream)
        stream.close()
        while client.server_info().running_sequences:  # the run's own limit ends this if it never happens
            pass
        assert client.server_info().pools[0].used_blocks == 0


def test_a_timeout_is_a_timeout_error(service: FakeService) -> None:
    with InferenceClient(service.address) as client, pytest.raises(TimeoutError):
        client.generate("the cat", SamplingParams(n=64, ignore_eos=True), timeout=0.1)


def test_nobody_there() -> None:
    with InferenceClient("127.0.0.1:1") as client:
        with pytest.raises(EngineStoppedError):
            client.generate("the cat")
        with pytest.raises(TimeoutError):
            client.wait_ready(timeout=0.2)
