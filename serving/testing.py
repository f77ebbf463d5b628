"""A server whose device is fake, for tests of clients and of the service itself: everything but the model is real.

Owns: nothing that runs in production. Must never: import jax.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from hkv_jax.engine.loop import EngineLoop, ServedModel
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.fake_engine import FakeEngineConfig, fake_engine
from hkv_jax.tokenizer import Tokenizer
from serving.client import AsyncInferenceClient
from serving.proto import hkv_inference_pb2 as pb
from serving.server import InferenceServer
from serving.server_options import ServerOptions

LIMITS = FakeEngineConfig(max_model_len=4096, vocab_size=300)
FOREVER = SamplingParams(ignore_eos=True, seed=7)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class FakeService:
    """A server that serves at ``address``, its engine, and a client of it."""

    address: str
    server: InferenceServer
    engine: EngineLoop
    client: AsyncInferenceClient

    @property
    def used_blocks(self) -> int:
        """Blocks held now, of all pools."""
        return sum(pool.used_blocks for pool in self.engine.stats().pools)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that another thread does.

        Raises:
            TimeoutError: it did not happen within 20 s.
        """
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def fake_service(
    tokenizer: Tokenizer, *, max_queue: int | None = None, drain_seconds: int = 20, limits: FakeEngineConfig = LIMITS
) -> AsyncGenerator[FakeService, None]:
    """Serves a fake engine of ``limits`` on a free port while the block runs; end of sequence is id 1, top_k is 5."""
    model = ServedModel(tokenizer, eos_token_ids=(1,), sampling_defaults={"top_k": 5})
    server = InferenceServer(ServerOptions(port=0, drain_seconds=drain_seconds))
    address = await server.start()
    with EngineLoop(fake_engine(limits), model, max_queue=max_queue) as engine:
        await server.serve("tiny", engine)
        try:
            async with AsyncInferenceClient(address) as client:
                yield FakeService(address, server, engine, client)
        finally:
            await server.stop()


def endless() -> pb.GenerateRequest:
    """A request of 64 samples: more than the fake engine finishes within any deadline of a test."""
    return pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(ignore_eos=True, n=64))


def run(body: Callable[[], Awaitable[T]]) -> T:
    """Runs ``body`` in an event loop of its own.

    Raises:
        TimeoutError: it took more than 60 s.
    """

    async def main() -> T:
        async with asyncio.timeout(60):
            return await body()

    return asyncio.run(main())
