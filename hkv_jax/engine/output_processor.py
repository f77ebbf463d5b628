"""The thread beside the step loop: tokens become text, stop strings are noticed, clients are told.

Owns: every write to an ``Outbox``, so that what a client sees has one order. Must never: touch the engine (it asks the
loop to), or let one request's trouble reach another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import secrets
import threading
from collections.abc import Callable, Iterable
from functools import partial

from hkv_jax.engine.outbox import Outbox
from hkv_jax.engine.request import Request
from hkv_jax.engine.sample_text import SampleText
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.errors import InternalError
from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.outputs import Completion, TokenLogprob, Usage
from hkv_jax.tokenizer import StopStrings, Tokenizer

logger = logging.getLogger(__name__)

PromptLogprobs = tuple[TokenLogprob, ...] | None


@dataclasses.dataclass(slots=True, eq=False)
class LivingRequest:
    """A request on its way out. After it was handed over, only the output thread changes it."""

    request: Request
    outbox: Outbox
    samples: tuple[SampleText, ...]
    num_open_samples: int
    num_output_tokens: int = 0
    prefix: PrefixUse | None = None

    @property
    def usage(self) -> Usage:
        """Token counts as of now; the cached prefix is what sample 0 found at first, whose prompt the others share."""
        tokens = Usage(self.request.prompt_len, self.num_output_tokens)
        if self.prefix is None:  # it ended before its first token
            return tokens
        return dataclasses.replace(
            tokens,
            cached_tokens=self.prefix.start,
            prefix_hit=self.prefix.hit,
            rebuilt_tokens=self.prefix.rebuilt_tokens,
        )

    @classmethod
    def create(cls, request: Request, tokenizer: Tokenizer) -> LivingRequest:
        """A request without output.

        Raises:
            RequestError, ConfigError: text is wanted, and the tokenizer is missing or broken.
        """
        params = request.params
        stop_strings = StopStrings(params.stop) if params.stop else None
        samples = []
        for sample in range(params.n):
            detokenizer = None
            if params.detokenize:
                skip, prompt = params.skip_special_tokens, request.prompt_token_ids
                detokenizer = tokenizer.detokenizer(skip_special_tokens=skip, prompt=prompt)
            samples.append(SampleText(request, sample, detokenizer, stop_strings))
        return cls(request, Outbox(request), tuple(samples), params.n)


@dataclasses.dataclass(frozen=True, slots=True)
class OutputListener:
    """What the output thread tells the loop; called from the output thread.

    began: a request got its first token. stopped: a stop string ended a sample that the engine still runs. ended: a
    request is over. broken: one is to be given up that the engine may still run; ``ended`` follows.
    """

    began: Callable[[LivingRequest], None]
    stopped: Callable[[LivingRequest, int], None]
    ended: Callable[[LivingRequest], None]
    broken: Callable[[LivingRequest], None]


class OutputProcessor:
    """Takes what the loop thread hands over, in order, and never makes it wait."""

    def __init__(self, listener: OutputListener) -> None:
        """Starts the thread."""
        self._listener = listener
        self._living: dict[Request, LivingRequest] = {}
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="hkv-output", daemon=True)
        self._thread.start()

    def add(self, living: LivingRequest) -> None:
        """Expects events of this request from now on."""
        self._queue.put(partial(self._add, living))

    def take(self, events: list[TokenEvent]) -> None:
        """Processes the events of a step; those of requests that are over are dropped."""
        self._queue.put(partial(self._take, events))

    def abort(self, living: LivingRequest) -> None:
        """Ends a request early; the client gets what there is."""
        self._queue.put(partial(self._abort, living))

    def fail(self, living: LivingRequest, error: Exception) -> None:
        """Ends a request with an error."""
        self._queue.put(partial(self._fail, living, error))

    def close(self, remaining: Iterable[LivingRequest], error: Exception) -> None:
        """Processes what was handed over, ends the requests that remain with an error, and ends the thread."""
        for living in remaining:
            self.fail(living, error)
        self._queue.put(None)

    def join(self) -> None:
        """Waits for the end of the thread; called by that thread itself, does nothing."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            job()

    def _add(self, living: LivingRequest) -> None:
        self._living[living.request] = living

    def _take(self, events: list[TokenEvent]) -> None:
        for event in events:
            living = self._living.get(event.sequence.request)
            if living is None:
                continue
            try:
                self._take_event(living, event)
            except Exception:
                self._give_up(living)

    def _take_event(self, living: LivingRequest, event: TokenEvent) -> None:
        sample = event.sequence.sample
        if living.samples[sample].ended:
            return
        piece = living.samples[sample].push(event)
        if not living.num_output_tokens:
            self._listener.began(living)
        living.num_output_tokens += 1
        if sample == 0:
            living.prefix = event.sequence.first_prefix
        if piece.finish_reason is not None and event.finish_reason is None:
            self._listener.stopped(living, sample)
        self._put(living, piece, event.prompt_logprobs)

    def _put(self, living: LivingRequest, piece: Completion, prompt_logprobs: PromptLogprobs = None) -> None:
        usage = None
        if piece.finish_reason is not None:
            living.num_open_samples -= 1
            if not living.num_open_samples:
                usage = living.usage
                self._end(living)
        living.outbox.put(piece, prompt_logprobs, usage)

    def _abort(self, living: LivingRequest) -> None:
        try:
            for sample in living.samples:
                if not sample.ended:
                    self._put(living, sample.abort())
        except Exception:
            self._give_up(living)

    def _fail(self, living: LivingRequest, error: Exception) -> None:
        self._end(living)
        with contextlib.suppress(Exception):  # the client's callback may raise; there is nobody left to tell
            living.outbox.fail(error)

    def _end(self, living: LivingRequest) -> None:
        """Forgets the request before its client learns the end: it may use the id again at once."""
        self._living.pop(living.request, None)
        self._listener.ended(living)

    def _give_up(self, living: LivingRequest) -> None:
        """Ends one request after an unexpected exception: a defect, or a client's callback raised."""
        error = InternalError(secrets.token_hex(4))
        logger.exception("%s: the output of request %s is given up", error, living.request.request_id)
        self._listener.broken(living)
        self._fail(living, error)
