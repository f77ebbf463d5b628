"""Streams for asyncio: nothing lost, nothing blocked, and a request that is left early is aborted."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable

import pytest

from hkv_jax.engine.async_stream import deltas_of
from hkv_jax.engine.loop import EngineLoop
from hkv_jax.errors import EngineStoppedError
from hkv_jax.outputs import FinishReason, StreamDelta
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.stepped_engine import SteppedEngine

Opener = Callable[..., EngineLoop]

PROMPT = [5, 6, 7]
ENDLESS = SamplingParams(ignore_eos=True, seed=0)


def tokens_of(deltas: list[StreamDelta]) -> tuple[int, ...]:
    return tuple(token_id for delta in deltas for token_id in delta.completion.token_ids)


def test_many_streams_in_one_event_loop(open_loop: Opener) -> None:
    loop = open_loop()
    params = ENDLESS.replace(max_tokens=30)
    expected = loop.submit(PROMPT, params).result()

    async def client() -> list[StreamDelta]:
        return [delta async for delta in deltas_of(loop.submit(PROMPT, params))]

    async def clients() -> list[list[StreamDelta]]:
        return await asyncio.gather(*[client() for _ in range(20)])

    for deltas in asyncio.run(clients()):
        assert tokens_of(deltas) == expected.outputs[0].token_ids
        assert [delta.usage for delta in deltas][-1] == expected.usage


def test_the_event_loop_is_free_while_a_stream_waits(open_loop: Opener, stepped: SteppedEngine) -> None:
    stream = open_loop(stepped).submit(PROMPT, ENDLESS.replace(max_tokens=2))

    async def read() -> list[StreamDelta]:
        reader = asyncio.ensure_future(_all(stream))
        await asyncio.sleep(0)
        assert not reader.done()
        stepped.run_freely()
        return await reader

    assert len(tokens_of(asyncio.run(read()))) == 2


async def _all(stream: object) -> list[StreamDelta]:
    return [delta async for delta in deltas_of(stream)]  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["break", "cancel"])
def test_a_stream_that_is_left_is_aborted(open_loop: Opener, stepped: SteppedEngine, how: str) -> None:
    stream = open_loop(stepped).submit(PROMPT, ENDLESS)
    ended = threading.Event()
    stream.set_on_end(ended.set)

    async def leave() -> None:
        stepped.run(2)
        async with contextlib.aclosing(deltas_of(stream)) as deltas:
            await anext(deltas)
            if how == "cancel":
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(anext(deltas), timeout=0)

    asyncio.run(leave())
    stepped.run_freely()
    assert ended.wait(timeout=10)
    assert stream.result().outputs[0].finish_reason is FinishReason.ABORT
    assert stepped.used_blocks == 0


def test_an_error_reaches_the_reader(open_loop: Opener, stepped: SteppedEngine) -> None:
    loop = open_loop(stepped)
    stream = loop.submit(PROMPT, ENDLESS)

    async def read() -> None:
        reader = asyncio.ensure_future(_all(stream))
        await asyncio.sleep(0)
        stepped.run_freely()
        await asyncio.to_thread(loop.close)
        with pytest.raises(EngineStoppedError):
            await reader

    asyncio.run(read())


def test_an_event_loop_that_is_gone_costs_nobody_else_anything(open_loop: Opener, stepped: SteppedEngine) -> None:
    loop = open_loop(stepped)
    left = loop.submit(PROMPT, ENDLESS.replace(max_tokens=5))
    other = loop.submit(PROMPT, ENDLESS.replace(max_tokens=5))

    async def begin() -> None:
        deltas = deltas_of(left)
        reader = asyncio.ensure_future(anext(deltas))
        await asyncio.sleep(0)
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader

    asyncio.run(begin())
    stepped.run_freely()
    assert other.result().outputs[0].finish_reason is FinishReason.LENGTH
