"""The engine: schedule, build, dispatch, and only then read the step before.

Owns: the step in flight and what happens when it fails. Must never: import jax, or know text, threads or clients.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Protocol, Self

from hkv_jax.engine.batch import StepBatch, build
from hkv_jax.engine.buckets import Buckets
from hkv_jax.engine.plan import StepPlan
from hkv_jax.engine.request import Request, SequenceState
from hkv_jax.engine.scheduler import Scheduler
from hkv_jax.engine.scheduler_config import SchedulerConfig
from hkv_jax.engine.step_result import StepResult
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.kvcache.layout import KVLayout
from hkv_jax.kvcache.manager import CacheManager
from hkv_jax.kvcache.policy import CachePolicy

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Failed steps of a request, without a token between them, after which it is given up."""


class StepHandle(Protocol):
    """A dispatched step."""

    def read(self) -> StepResult:
        """Waits for the step; raises what went wrong on the device."""
        ...


class StepRunner(Protocol):
    """The device side, as the engine sees it."""

    @property
    def buckets(self) -> Buckets:
        """The step shapes it has programs for."""
        ...

    def dispatch(self, plan: StepPlan, batch: StepBatch) -> StepHandle:
        """Starts a step; steps run in the order of dispatch."""
        ...

    def reset(self) -> None:
        """Starts over with empty lanes and an empty cache."""
        ...


class StepFailedError(Exception):
    """A step failed again and again; the requests in it were dropped, all others go on.

    ``request_ids`` are those dropped. The cause is chained, and nothing for a client to see.
    """

    def __init__(self, request_ids: tuple[str, ...]) -> None:
        super().__init__(f"a step failed {MAX_ATTEMPTS} times in a row; {len(request_ids)} requests were dropped")
        self.request_ids = request_ids


@dataclasses.dataclass(frozen=True, slots=True)
class _InFlight:
    plan: StepPlan
    handle: StepHandle


class Engine:
    """Scheduler, cache and runner, driven one step at a time by one thread."""

    def __init__(self, scheduler: Scheduler, cache: CacheManager, runner: StepRunner) -> None:
        """An engine over a scheduler of that very cache, both idle."""
        self.scheduler = scheduler
        self.cache = cache
        self._runner = runner
        self._in_flight: _InFlight | None = None
        self._failures: dict[str, int] = {}  # steps of a request that failed since it last got a token

    @classmethod
    def over(
        cls,
        layout: KVLayout,
        config: SchedulerConfig,
        runner: StepRunner,
        policy: CachePolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """An idle engine with a scheduler and a cache of its own; ``runner`` is made for the same layout and limits."""
        cache = CacheManager(layout, config.max_num_seqs, policy)
        return cls(Scheduler(config, cache, clock), cache, runner)

    @property
    def buckets(self) -> Buckets:
        """The step shapes of the runner."""
        return self._runner.buckets

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return self._in_flight is not None or self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: it could never be served.
        """
        self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Ends a request now; its blocks are free for the next step. An unknown id is ignored."""
        self.scheduler.abort(request_id)

    def finish(self, request_id: str, sample: int) -> None:
        """Ends one sample whose text reached a stop string. One that has ended already is ignored."""
        self.scheduler.finish(request_id, sample)

    def step(self) -> list[TokenEvent]:
        """Dispatches the next step, then reads and commits the one before; no events on the first call of a run.

        A step that fails is lost with everything on the device: all running requests are computed again, and nobody
        notices, since draws do not depend on what else happened.

        Raises:
            StepFailedError: some requests had that several times without a token between. The engine can go on.
            AssertionError: an invariant is broken. It cannot.
        """
        plan = self.scheduler.schedule()
        previous, self._in_flight = self._in_flight, None
        if plan is not None:
            batch = build(plan, self.cache, self.scheduler.lanes, self.buckets)
            try:
                self._in_flight = _InFlight(plan, self._runner.dispatch(plan, batch))
            except Exception as error:
                return self._recover(plan, error)
        if previous is None:
            return []
        try:
            result = previous.handle.read()
        except Exception as error:
            return self._recover(previous.plan, error)
        events = self.scheduler.commit(previous.plan, result)
        if self._failures:
            for event in events:
                self._failures.pop(event.sequence.request.request_id, None)
        return events

    def _recover(self, failing: StepPlan, error: Exception) -> list[TokenEvent]:
        """Starts over without the steps in flight, and without the requests of a step that keeps failing."""
        if isinstance(error, AssertionError):
            raise error  # a broken invariant: trying again would hide it
        # The id of a request that has ended may be another's by now.
        living = (s for s in failing.sequences if s.state is not SequenceState.FINISHED)
        request_ids = tuple(dict.fromkeys(sequence.request.request_id for sequence in living))
        self._failures = {request_id: self._failures.get(request_id, 0) + 1 for request_id in request_ids}
        attempt = max(self._failures.values(), default=1)
        logger.exception("a step failed (attempt %d of %d); starting over", attempt, MAX_ATTEMPTS)
        self._in_flight = None
        self.scheduler.reset()
        self._runner.reset()
        given_up = tuple(request_id for request_id, count in self._failures.items() if count >= MAX_ATTEMPTS)
        if given_up:
            for request_id in given_up:
                del self._failures[request_id]
                self.scheduler.abort(request_id)
            raise StepFailedError(given_up) from error
        return []
