"""What waits to be read by the client of one request: a buffer that merges, written by one thread and read by another.

Owns: the hand-over between threads. A client that lags gets fewer, larger deltas; the buffer never holds more than one
output, so nobody ever has to wait for a client. Must never: know text or tokens beyond joining them; import asyncio.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from hkv_jax.engine.request import Request
from hkv_jax.outputs import Completion, RequestOutput, StreamDelta, TokenLogprob, Usage

Callback = Callable[[], None]


class Outbox:
    """The writer's side and the buffer between.

    The order of deltas is that of each sample's tokens; samples come as their turn comes. A delta of a request that
    asked for prompt logprobs waits for these.
    """

    def __init__(self, request: Request) -> None:
        """An empty buffer for a request that lives."""
        self._request_id = request.request_id
        self._awaits_prompt_logprobs = request.params.prompt_logprobs is not None
        self._condition = threading.Condition()
        self._pieces: dict[int, list[Completion]] = {}
        self._prompt_logprobs: tuple[TokenLogprob, ...] | None = None
        self._usage: Usage | None = None
        self._error: Exception | None = None
        self._closed = False
        self._on_ready: Callback | None = None
        self._on_end: Callback | None = None

    def put(
        self,
        piece: Completion,
        prompt_logprobs: tuple[TokenLogprob, ...] | None = None,
        usage: Usage | None = None,
    ) -> None:
        """Adds what is new of a sample; ``usage`` makes it the last piece of the request."""
        with self._condition:
            if self._closed:
                return
            was_readable = self._readable
            self._pieces.setdefault(piece.sample, []).append(piece)
            if prompt_logprobs is not None:
                self._prompt_logprobs = prompt_logprobs
                self._awaits_prompt_logprobs = False
            if usage is not None:
                self._usage = usage
                self._closed = True
            callbacks = self._callbacks(was_readable)
        _call(callbacks)

    def fail(self, error: Exception) -> None:
        """Ends the request, if it has not ended, with an error: the client sees it after what it has not read yet."""
        with self._condition:
            if self._closed:
                return
            was_readable = self._readable
            self._error = error
            self._closed = True
            callbacks = self._callbacks(was_readable)
        _call(callbacks)

    def take(self) -> StreamDelta | None:
        """The next delta, ``None`` when there is none now; raises the error of a failed request after its last one."""
        with self._condition:
            return self._take()

    def wait(self, timeout: float | None) -> StreamDelta | None:
        """The next delta, once there is one; ``None`` when the request has ended and all was read."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._condition:
            while not self._readable and not self._closed:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"nothing new within {timeout} s")
                self._condition.wait(left)
            return self._take()

    @property
    def closed(self) -> bool:
        """Whether nothing more will be written."""
        return self._closed

    @property
    def drained(self) -> bool:
        """Whether the request has ended without an error, and all was read."""
        with self._condition:
            return self._closed and not self._pieces and self._error is None

    def set_on_ready(self, callback: Callback | None) -> None:
        """See ``RequestStream.set_on_ready``."""
        with self._condition:
            self._on_ready = callback
            ready = self._readable or self._closed
        if ready and callback is not None:
            callback()

    def set_on_end(self, callback: Callback | None) -> None:
        """See ``RequestStream.set_on_end``."""
        with self._condition:
            self._on_end = callback
            closed = self._closed
        if closed and callback is not None:
            callback()

    @property
    def _readable(self) -> bool:
        return bool(self._pieces) and (self._closed or not self._awaits_prompt_logprobs)

    def _callbacks(self, was_readable: bool) -> list[Callback]:
        """Wakes who waits, and returns whom to call once the lock is free."""
        callbacks = []
        if self._closed or (not was_readable and self._readable):
            self._condition.notify_all()
            if self._on_ready is not None:
                callbacks.append(self._on_ready)
        if self._closed and self._on_end is not None:
            callbacks.append(self._on_end)
        return callbacks

    def _take(self) -> StreamDelta | None:
        if not self._readable:
            if self._error is not None:
                raise self._error
            return None
        pieces = self._pieces.pop(next(iter(self._pieces)))
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        usage = None if self._pieces else self._usage
        return StreamDelta(self._request_id, _merged(pieces), prompt_logprobs, usage)


class RequestStream:
    """The client's side of one request; one reader at a time.

    Iterating gives deltas until the request ends: only what is new, of one sample each. ``usage`` is set in the last. A
    request that was aborted, or whose deadline passed, ends with ``finish_reason`` abort.
    """

    def __init__(self, request: Request, outbox: Outbox, abort: Callback) -> None:
        """The stream of ``request``; ``abort`` ends it early."""
        self.request_id = request.request_id
        self.prompt_token_ids = request.prompt_token_ids
        self._num_samples = request.params.n
        self._outbox = outbox
        self._abort = abort

    def get(self, timeout: float | None = None) -> StreamDelta | None:
        """Waits for the next delta, at most ``timeout`` seconds; ``None``: the request has ended and all was read.

        Raises:
            TimeoutError: nothing came in that time.
            InternalError: the request was given up because of a defect; the message has an id for the log, no more.
            EngineStoppedError: the engine was closed before the request ended.
        """
        return self._outbox.wait(timeout)

    def poll(self) -> StreamDelta | None:
        """The next delta if there is one now; after ``None``, ``ended`` tells whether more will come.

        Raises:
            InternalError, EngineStoppedError: as ``get``.
        """
        return self._outbox.take()

    @property
    def ended(self) -> bool:
        """Whether the request has ended without an error and all of it was read."""
        return self._outbox.drained

    def __iter__(self) -> Iterator[StreamDelta]:
        while (delta := self.get()) is not None:
            yield delta

    def abort(self) -> None:
        """Ends the request early; its blocks are free within one step. Does nothing to one that has ended."""
        if not self._outbox.closed:
            self._abort()

    def set_on_ready(self, callback: Callback | None) -> None:
        """Calls ``callback`` from another thread whenever ``poll`` goes from nothing to something, and at the end.

        At once if that is so already. It must return quickly and not read the stream itself; for asyncio it is
        ``lambda: event_loop.call_soon_threadsafe(event.set)``.
        """
        self._outbox.set_on_ready(callback)

    def set_on_end(self, callback: Callback | None) -> None:
        """Calls ``callback`` from another thread once the request has ended; at once if it has."""
        self._outbox.set_on_end(callback)

    def result(self) -> RequestOutput:
        """Waits for the end and returns everything that was not read before.

        Raises:
            InternalError, EngineStoppedError: as ``get``.
        """
        pieces: list[list[Completion]] = [[] for _ in range(self._num_samples)]
        prompt_logprobs = None
        usage = None
        for delta in self:
            pieces[delta.completion.sample].append(delta.completion)
            prompt_logprobs = prompt_logprobs or delta.prompt_logprobs
            usage = usage or delta.usage
        assert usage is not None, "a stream ended without usage"
        outputs = tuple(_merged(of_sample) for of_sample in pieces if of_sample)
        return RequestOutput(self.request_id, self.prompt_token_ids, outputs, usage, prompt_logprobs)


def _merged(pieces: list[Completion]) -> Completion:
    """The pieces of one sample, in order, as one."""
    last = pieces[-1]
    if len(pieces) == 1:
        return last
    logprobs = None
    if any(piece.logprobs is not None for piece in pieces):
        logprobs = tuple(entry for piece in pieces for entry in piece.logprobs or ())
    return Completion(
        sample=last.sample,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token_id for piece in pieces for token_id in piece.token_ids),
        logprobs=logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )


def _call(callbacks: list[Callback]) -> None:
    for callback in callbacks:
        callback()
