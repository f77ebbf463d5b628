"""A client of ``hkv.v1.Inference``, blocking and for asyncio.

Owns: the connection, and that errors of the server come out as the exceptions of ``hkv_jax.errors``. Must never: check
what the server checks, or retry.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hkv_jax.outputs import Completion, StreamDelta, TokenLogprob, Usage
from hkv_jax.sampling_params import SamplingParams
from serving import convert
from serving.info import ServerInfo
from serving.proto import hkv_inference_pb2 as pb
from serving.proto import hkv_inference_pb2_grpc as pb_grpc
from serving.status import error_of

DEFAULT_ADDRESS = "127.0.0.1:50051"

_SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_SERVING = health_pb2.HealthCheckResponse.SERVING
# The server is trusted with the size of its answers.
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True, slots=True)
class GenerateResult:
    """Everything that came back for one prompt; fields as in ``hkv_jax.RequestOutput``."""

    request_id: str
    outputs: tuple[Completion, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


class InferenceClient:
    """Blocking; safe to use from several threads. Close it, or use it in a ``with``.

    Every method raises RequestError, OverloadedError or EngineStoppedError (which an unreachable server is, too) as the
    server says, TimeoutError when ``timeout`` seconds have passed, and ``grpc.RpcError`` for all else.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        """Connects on first use; ``address`` is ``host:port``."""
        self._channel = grpc.insecure_channel(address, _OPTIONS)
        self._stub = pb_grpc.InferenceStub(self._channel)

    def wait_ready(self, timeout: float | None = None) -> None:
        """Waits until the server is reachable and has warmed up."""
        request = health_pb2.HealthCheckRequest(service=_SERVICE)
        stub = health_pb2_grpc.HealthStub(self._channel)
        with _translated():
            watch = stub.Watch(request, timeout=timeout, wait_for_ready=True)
            try:
                while next(watch).status != _SERVING:
                    pass
            finally:
                watch.cancel()

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str = "",
        timeout: float | None = None,
    ) -> GenerateResult:
        """Completes a prompt (text, or token ids); options that are unset are the server's to choose."""
        with _translated():
            return _result(self._stub.Generate(_message(prompt, params, request_id), timeout=timeout))

    def generate_stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str = "",
        timeout: float | None = None,
    ) -> Generator[StreamDelta, None, None]:
        """As ``generate``, piece by piece; leaving the iteration early (``close()`` of it) cancels the request."""
        with _translated():
            call = self._stub.GenerateStream(_message(prompt, params, request_id), timeout=timeout)
            try:
                for chunk in call:
                    yield convert.delta_from_wire(chunk)
            finally:
                call.cancel()

    def server_info(self, timeout: float | None = None) -> ServerInfo:
        """What is served, and what the cache holds now."""
        with _translated():
            return convert.info_from_wire(self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout))

    def close(self) -> None:
        """Hangs up; calls that live are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncInferenceClient:
    """The same for asyncio, for use inside one event loop."""

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        """Connects on first use; ``address`` is ``host:port``."""
        self._channel = grpc.aio.insecure_channel(address, _OPTIONS)
        self._stub = pb_grpc.InferenceStub(self._channel)

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Waits until the server is reachable and has warmed up."""
        request = health_pb2.HealthCheckRequest(service=_SERVICE)
        stub = health_pb2_grpc.HealthStub(self._channel)
        with _translated():
            watch = stub.Watch(request, timeout=timeout, wait_for_ready=True)
            try:
                while (await watch.read()).status != _SERVING:
                    pass
            finally:
                watch.cancel()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str = "",
        timeout: float | None = None,
    ) -> GenerateResult:
        """Completes a prompt (text, or token ids); options that are unset are the server's to choose."""
        with _translated():
            return _result(await self._stub.Generate(_message(prompt, params, request_id), timeout=timeout))

    async def generate_stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str = "",
        timeout: float | None = None,
    ) -> AsyncGenerator[StreamDelta, None]:
        """As ``generate``, piece by piece; leaving the iteration early (``aclose()`` of it) cancels the request."""
        with _translated():
            call = self._stub.GenerateStream(_message(prompt, params, request_id), timeout=timeout)
            try:
                async for chunk in call:
                    yield convert.delta_from_wire(chunk)
            finally:
                call.cancel()

    async def server_info(self, timeout: float | None = None) -> ServerInfo:
        """What is served, and what the cache holds now."""
        with _translated():
            return convert.info_from_wire(await self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout))

    async def close(self) -> None:
        """Hangs up; calls that live are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def _message(prompt: Prompt, params: SamplingParams | None, request_id: str) -> pb.GenerateRequest:
    message = pb.GenerateRequest(request_id=request_id)
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.SetInParent()
        message.token_ids.ids.extend(prompt)
    if params is not None:
        message.sampling.CopyFrom(convert.sampling_to_wire(params))
    return message


def _result(response: pb.GenerateResponse) -> GenerateResult:
    return GenerateResult(
        request_id=response.request_id,
        outputs=tuple(convert.completion_from_wire(output) for output in response.outputs),
        usage=convert.usage_from_wire(response.usage),
        prompt_logprobs=convert.logprobs_from_wire(response.prompt_logprobs),
    )


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Lets errors of the server out as the exceptions they stand for."""
    try:
        yield
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise TimeoutError("the call's timeout has passed") from error
        translated = error_of(error)
        if translated is None:
            raise
        raise translated from error
