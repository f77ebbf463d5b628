"""A request's stream for asyncio.

Owns: the bridge from the output thread to an event loop. Must never: block the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from hkv_jax.engine.outbox import RequestStream
from hkv_jax.outputs import StreamDelta


async def deltas_of(stream: RequestStream) -> AsyncGenerator[StreamDelta, None]:
    """Deltas until the request ends, like iterating over ``stream``; one that is left early is aborted.

    Leave it with ``contextlib.aclosing``, or the abort waits for the garbage collector.

    Raises:
        InternalError, EngineStoppedError: as ``RequestStream.get``.
    """
    event_loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    stream.set_on_ready(lambda: _set(event_loop, ready))
    try:
        while True:
            ready.clear()
            while (delta := stream.poll()) is not None:
                yield delta
            if stream.ended:
                return
            await ready.wait()
    finally:
        stream.set_on_ready(None)
        stream.abort()


def _set(event_loop: asyncio.AbstractEventLoop, ready: asyncio.Event) -> None:
    # A closed event loop has nobody who waits.
    if not event_loop.is_closed():
        event_loop.call_soon_threadsafe(ready.set)
