"""The RPCs of ``hkv.v1.Inference``: requests go to the engine loop, deltas come back.

Owns: when a call is refused, and that whatever ends a call ends its request. Must never: block the event loop, or know
what happens inside the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TypeAlias

import grpc

from hkv_jax.engine.async_stream import deltas_of
from hkv_jax.engine.loop import EngineLoop
from hkv_jax.engine.outbox import RequestStream
from hkv_jax.errors import EngineStoppedError
from serving import convert
from serving.info import server_info
from serving.proto import hkv_inference_pb2 as pb
from serving.proto import hkv_inference_pb2_grpc as pb_grpc
from serving.status import status_of
from serving.validation import check_request

Context: TypeAlias = grpc.aio.ServicerContext


class InferenceServicer(pb_grpc.InferenceServicer):
    """Serves while an engine is attached; before and after, calls are ``UNAVAILABLE``."""

    def __init__(self) -> None:
        self._engine: EngineLoop | None = None
        self._model = ""
        self._refusal = "the server is starting; try again once its health is SERVING"
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def attach(self, model: str, engine: EngineLoop) -> None:
        """Serves requests from now on; ``model`` is a name to show."""
        self._model = model
        self._engine = engine

    def detach(self) -> None:
        """Refuses new calls from now on; those that live go on."""
        self._engine = None
        self._refusal = "the server is shutting down"

    async def drain(self, seconds: float) -> bool:
        """Waits until no request lives, at most that long; returns whether none does."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return self._num_calls == 0

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        """All samples of a prompt, once all have ended."""
        async with self._call(context):
            stream = await self._submit(request, context)
            try:
                await _end_of(stream)
            finally:
                stream.abort()
            # Long outputs take their time; others' tokens go on meanwhile.
            return await asyncio.to_thread(lambda: convert.output_to_wire(stream.result()))

    async def GenerateStream(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateChunk]:
        """Tokens as they come; a client that lags gets fewer, larger chunks."""
        async with self._call(context):
            stream = await self._submit(request, context)
            async with contextlib.aclosing(deltas_of(stream)) as deltas:
                async for delta in deltas:
                    yield convert.delta_to_wire(delta)

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        """What is served, and how it is going."""
        async with self._call(context):
            return convert.info_to_wire(server_info(self._model, self._attached()))

    @contextlib.asynccontextmanager
    async def _call(self, context: Context) -> AsyncIterator[None]:
        """Counts the call while it lives, and ends it with the status of whatever error leaves the block."""
        self._num_calls += 1
        self._idle.clear()
        try:
            yield
        except Exception as error:  # the edge: nothing unexpected may reach a client as it is
            await context.abort(*status_of(error))
        finally:
            self._num_calls -= 1
            if not self._num_calls:
                self._idle.set()

    def _attached(self) -> EngineLoop:
        if self._engine is None:
            raise EngineStoppedError(self._refusal)
        return self._engine

    async def _submit(self, message: pb.GenerateRequest, context: Context) -> RequestStream:
        await context.send_initial_metadata(())
        engine = self._attached()
        request = check_request(message)
        ids: Sequence[int]
        if isinstance(request.prompt, str):
            ids = await asyncio.to_thread(engine.model.tokenizer.encode, request.prompt)
        else:
            ids = request.prompt
        stream = engine.submit(ids, request.params, request_id=request.request_id)
        # Cancelled and past its deadline, a call need not have a frame that notices soon.
        context.add_done_callback(lambda _: stream.abort())
        return stream


async def _end_of(stream: RequestStream) -> None:
    """Waits until the request has ended, in whatever way."""
    event_loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def on_end() -> None:
        # Without an event loop nobody waits.
        with contextlib.suppress(RuntimeError):
            event_loop.call_soon_threadsafe(ended.set)

    stream.set_on_end(on_end)
    try:
        await ended.wait()
    finally:
        stream.set_on_end(None)
