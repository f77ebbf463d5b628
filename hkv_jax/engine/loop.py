"""The one thread that owns the engine, and the door to it for all others.

Owns: the inbox, request ids, deadlines, the queue's limit, and the end of everything. With ``outbox`` it is the only
module of the engine that has locks. Must never: wait for a client or for text (``output_processor`` does that beside
it), or know gRPC or asyncio.
"""

from __future__ import annotations

import dataclasses
import heapq
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from hkv_jax.engine.engine import Engine, StepFailedError
from hkv_jax.engine.outbox import RequestStream
from hkv_jax.engine.output_processor import LivingRequest, OutputListener, OutputProcessor
from hkv_jax.engine.request import Request
from hkv_jax.engine.stats import EngineStats
from hkv_jax.engine.stats_history import Moment, StatsHistory
from hkv_jax.errors import EngineStoppedError, InternalError, OverloadedError, RequestError
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Command = Callable[[Engine], None]


@dataclasses.dataclass(frozen=True, slots=True)
class ServedModel:
    """What the loop must know of the model beside the engine.

    ``eos_token_ids`` end a generation; ``sampling_defaults`` are values for fields of ``SamplingParams`` a request
    leaves unset.
    """

    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    sampling_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def resolve(self, params: SamplingParams) -> SamplingParams:
        """``params`` with the model's values where they are unset; without a tokenizer ``detokenize`` is unset to off.

        Raises:
            RequestError: the result disagrees with itself.
        """
        defaults = dict(self.sampling_defaults)
        if not self.tokenizer.available:
            defaults["detokenize"] = False
        return params.with_defaults(defaults)


class EngineLoop:
    """Runs an engine on a thread of its own; every method may be called from any thread.

    Requests come in by ``submit`` and are read from the ``RequestStream`` it returns. ``close`` it, or use it in a
    ``with``.
    """

    def __init__(
        self,
        engine: Engine,
        model: ServedModel,
        *,
        max_queue: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the threads. The loop owns ``engine`` from now on, and lets go of it when it ends.

        Args:
            engine: idle.
            model: the model it runs.
            max_queue: most requests that may wait for their first token, ``None`` for any number.
            clock: in seconds; deadlines are times of this clock.
        """
        self.model = model
        self.limits = engine.scheduler.config
        self._max_queue = max_queue
        self._clock = clock
        self._condition = threading.Condition()
        # Under the condition's lock:
        self._inbox: list[Command] = []
        self._requests: dict[str, LivingRequest] = {}
        self._num_queued = 0
        self._num_finished = 0
        self._draining = False
        self._stop_reason: str | None = None
        # Of the loop thread alone:
        self._deadlines: list[tuple[float, int, LivingRequest]] = []
        self._stats = EngineStats.of(engine)
        self._began_at = clock()
        self._history = StatsHistory(self._stats)
        self._output = OutputProcessor(
            OutputListener(began=self._began, stopped=self._sample_stopped, ended=self._ended, broken=self._broken)
        )
        # The engine is the thread's argument alone, so that all its memory is free when the thread has ended.
        self._thread = threading.Thread(target=self._run, args=(engine,), name="hkv-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str = "",
        deadline: float | None = None,
    ) -> RequestStream:
        """Queues a request and returns the stream of its output; never waits for the engine.

        Args:
            prompt_token_ids: at least one id, fewer than ``max_model_len``.
            params: unset fields take the model's values.
            request_id: unique among the living; made up when empty.
            deadline: a time of the loop's clock (``time.monotonic()``) at which the request is aborted.

        Raises:
            RequestError: the request could never be served, or its id is in use.
            OverloadedError: ``max_queue`` requests are waiting already.
            EngineStoppedError: the loop was closed or has failed.
            ConfigError: text is wanted and the model's tokenizer is broken.
        """
        self._check_running()
        resolved = self.model.resolve(params or SamplingParams())
        request_id = request_id or secrets.token_hex(8)
        request = Request.create(request_id, prompt_token_ids, resolved, self.model.eos_token_ids)
        self.limits.check(request)
        living = LivingRequest.create(request, self.model.tokenizer)
        with self._condition:
            self._check_running()
            if request_id in self._requests:
                raise RequestError(f"request_id {request_id!r} is in use; choose another, or leave it out")
            if self._max_queue is not None and self._num_queued >= self._max_queue:
                raise OverloadedError(f"{self._num_queued} requests wait, max_queue is {self._max_queue}; try later")
            self._requests[request_id] = living
            self._num_queued += 1
            self._send(partial(self._add, living, deadline))
        return RequestStream(request, living.outbox, partial(self._request_abort, living))

    def abort(self, request_id: str) -> bool:
        """Ends a request early; its blocks are free within one step, its stream ends with reason ``abort``.

        Returns whether such a request lived.
        """
        with self._condition:
            living = self._requests.get(request_id)
        if living is None:
            return False
        self._request_abort(living)
        return True

    def stats(self) -> EngineStats:
        """Counts and pools as of the last step."""
        with self._condition:
            return dataclasses.replace(
                self._stats, num_requests=len(self._requests), num_finished_requests=self._num_finished
            )

    def history(self) -> tuple[Moment, ...]:
        """Counts and pools after some of the steps so far, evenly spaced; only ``stats`` counts requests."""
        return self._history.moments()

    @property
    def running(self) -> bool:
        """Whether requests are taken."""
        return self._stop_reason is None

    def close(self, *, drain: bool = False) -> None:
        """Takes no more requests and ends both threads; a second call does nothing more.

        Args:
            drain: wait until every living request has its whole output; else those end with ``EngineStoppedError``.
        """
        with self._condition:
            if self._stop_reason is None:
                self._stop_reason = "the engine was closed"
                self._draining = drain
            elif not drain:
                self._draining = False
            self._condition.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._output.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_running(self) -> None:
        if self._stop_reason is not None:
            raise EngineStoppedError(f"{self._stop_reason}; it takes no more requests")

    def _send(self, command: Command) -> None:
        """Has the loop thread run ``command`` before its next step; for who holds the lock."""
        self._inbox.append(command)
        self._condition.notify_all()

    # The loop thread.

    def _run(self, engine: Engine) -> None:
        error: Exception = EngineStoppedError("the engine was closed before the request ended")
        try:
            while self._run_commands(engine):
                self._expire(engine)
                self._step(engine)
        except Exception:
            error = InternalError(secrets.token_hex(4))
            logger.exception("%s: the engine has stopped", error)
        self._end(error)

    def _run_commands(self, engine: Engine) -> bool:
        """Waits for something to do, and does what the inbox says; False: it is time to end."""
        with self._condition:
            while not (self._inbox or engine.has_work or self._stop_reason is not None):
                self._condition.wait()
            commands, self._inbox = self._inbox, []
            running = self._stop_reason is None
        for command in commands:
            command(engine)
        return running or (self._draining and engine.has_work)

    def _step(self, engine: Engine) -> None:
        if not engine.has_work:
            return
        try:
            events = engine.step()
        except StepFailedError as failure:
            error = InternalError(secrets.token_hex(4))
            logger.exception("%s: %d requests were given up", error, len(failure.request_ids))
            for request_id in failure.request_ids:
                if (living := self._requests.get(request_id)) is not None:
                    self._output.fail(living, error)
            events = []
        # First the figures, then the events: a client that sees its last token finds it counted.
        self._stats = self._stats.after_step(engine, len(events))
        self._history.add(self._clock() - self._began_at, self._stats)
        if events:
            self._output.take(events)

    def _expire(self, engine: Engine) -> None:
        """Aborts the requests whose deadline has passed."""
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            self._abort(heapq.heappop(self._deadlines)[2], engine)
        if len(self._deadlines) > 2 * len(self._requests) + 64:
            self._deadlines = [entry for entry in self._deadlines if self._lives(entry[2])]
            heapq.heapify(self._deadlines)

    def _add(self, living: LivingRequest, deadline: float | None, engine: Engine) -> None:
        self._output.add(living)
        try:
            engine.add(living.request)
        except RequestError as error:
            self._output.fail(living, error)
            return
        self._stats = self._stats.after_add(living.request)
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, self._stats.num_added_requests, living))

    def _abort(self, living: LivingRequest, engine: Engine) -> None:
        # One that is over has left the engine, or is about to by a command that was sent before its id was free again.
        if self._lives(living):
            engine.abort(living.request.request_id)
            self._output.abort(living)

    def _lives(self, living: LivingRequest) -> bool:
        return self._requests.get(living.request.request_id) is living

    def _end(self, error: Exception) -> None:
        with self._condition:
            if self._stop_reason is None:
                self._stop_reason = f"the engine has stopped after {error}"
            self._inbox.clear()
            remaining = list(self._requests.values())
        self._deadlines.clear()
        # Drained requests have left the engine, but perhaps not the output thread: it fails only what is left then.
        self._output.close(remaining, error)

    # Called from the output thread or a client's.

    def _request_abort(self, living: LivingRequest) -> None:
        with self._condition:
            self._send(partial(self._abort, living))

    def _began(self, living: LivingRequest) -> None:
        with self._condition:
            self._num_queued -= 1

    def _sample_stopped(self, living: LivingRequest, sample: int) -> None:
        with self._condition:
            self._send(lambda engine: engine.finish(living.request.request_id, sample))

    def _broken(self, living: LivingRequest) -> None:
        with self._condition:
            # The id of one that has ended may be another's by now.
            if self._lives(living):
                self._send(lambda engine: engine.abort(living.request.request_id))

    def _ended(self, living: LivingRequest) -> None:
        with self._condition:
            if self._lives(living):
                del self._requests[living.request.request_id]
                self._num_finished += 1
                self._num_queued -= not living.num_output_tokens
