"""A trace through the engine's own scheduler and cache, in virtual time, with outputs that the trace forces.

Owns: the loop: who is submitted when, and what a step's rows draw. Must never: import jax, or decide what the
scheduler decides.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hkv_jax.engine.plan import StepPlan
from hkv_jax.engine.request import Request
from hkv_jax.engine.scheduler import Scheduler
from hkv_jax.engine.scheduler_config import SchedulerConfig
from hkv_jax.engine.step_result import StepResult
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.errors import RequestError
from hkv_jax.kvcache.manager import CacheManager
from hkv_jax.outputs import PrefixHit
from hkv_jax.sampling_params import SamplingParams
from tools.cache_simulation.arrivals import Arrivals
from tools.cache_simulation.measurements import HIT_KINDS, Measurements
from tools.cache_simulation.token_ids import output_ids, prompt_ids
from tools.cache_simulation.trace import TraceRequest
from tools.cache_simulation.virtual_clock import StepCost, VirtualClock

MAX_IDLE_STEPS = 100_000
"""Steps in a row that plan nothing although requests wait, after which the scheduler is taken to be stuck."""


class StuckError(Exception):
    """Requests wait, and the scheduler never runs them."""


@dataclasses.dataclass(slots=True)
class _Live:
    """A request in the engine: its forced output, and when it was submitted."""

    outputs: list[int]
    submitted: float


class Replay:
    """One run of a trace; ``measured`` grows with every step."""

    def __init__(
        self, requests: Sequence[TraceRequest], cache: CacheManager, config: SchedulerConfig, cost: StepCost
    ) -> None:
        """An idle engine over ``cache``, and nothing submitted."""
        self.clock = VirtualClock()
        self.cache = cache
        self.scheduler = Scheduler(config, cache, self.clock)
        self.measured = Measurements(requests=len(requests))
        self._arrivals = Arrivals(requests)
        self._cost = cost
        self._live: dict[str, _Live] = {}
        self._idle_steps = 0

    def run(self, after_step: Callable[[Replay], None] | None = None) -> Measurements:
        """To the end of the trace; ``after_step`` is called after each step.

        Raises:
            StuckError: it has no end.
        """
        while self.step():
            if after_step is not None:
                after_step(self)
        self._read_totals()
        return self.measured

    def step(self) -> bool:
        """Submits who has arrived, and plans, runs and commits one step; False when the trace has ended."""
        if not self.scheduler.has_work:
            upcoming = self._arrivals.next_arrival
            if upcoming is None:
                return False
            self.clock.wait_until(upcoming)
        self._submit()
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        self._take_table_updates()
        self.measured.host_seconds += time.perf_counter() - began
        if plan is None:
            self._idle()
            return True
        self._idle_steps = 0
        self._count(plan)
        result = StepResult(self._forced(plan))
        began = time.perf_counter()
        events = self.scheduler.commit(plan, result)
        self.measured.host_seconds += time.perf_counter() - began
        for event in events:
            self._read(event)
        return True

    def _submit(self) -> None:
        for request in self._arrivals.take(self.clock.now):
            params = SamplingParams(max_tokens=request.output_len, ignore_eos=True, detokenize=False, seed=0)
            created = Request.create(request.request_id, prompt_ids(request).tolist(), params)
            began = time.perf_counter()
            try:
                self.scheduler.add(created)
            except RequestError:
                self._arrivals.finish(request.request_id, self.clock.now)
                continue
            self.measured.host_seconds += time.perf_counter() - began
            self._live[request.request_id] = _Live(output_ids(request).tolist(), self.clock.now)

    def _take_table_updates(self) -> None:
        """What the device's tables would be told; building a batch takes it, and none is built here."""
        for group in range(len(self.cache.layout.groups)):
            self.cache.take_table_updates(group)

    def _idle(self) -> None:
        """Nobody can run now: time passes until somebody arrives, a step's time at most."""
        self._idle_steps += 1
        if self._idle_steps > MAX_IDLE_STEPS:
            raise StuckError(f"{self.scheduler.num_waiting} requests wait at {self.clock.now:.1f} s, and none can run")
        upcoming = self._arrivals.next_arrival
        step = self._cost.seconds(0, 0)
        if upcoming is not None and self.clock.now < upcoming < self.clock.now + step:
            self.clock.wait_until(upcoming)
        else:
            self.clock.advance(step)

    def _count(self, plan: StepPlan) -> None:
        """Counts the step and lets its time pass."""
        measured = self.measured
        running = self.scheduler.num_running
        measured.steps += 1
        measured.scheduled += plan.num_rows
        measured.running_sum += running
        measured.peak_running = max(measured.peak_running, running)
        groups = self.cache.layout.groups
        copied = sum(groups[copy.group].format.block_bytes for copy in plan.copies)
        measured.copied_bytes += copied
        self.clock.advance(self._cost.seconds(sum(chunk.num_tokens for chunk in plan.chunks), copied))

    def _forced(self, plan: StepPlan) -> NDArray[np.int32]:
        """What each row draws: the next token of its request's output; rows that draw nothing hold anything."""
        tokens = np.zeros(plan.num_rows, np.int32)
        for row, sequence in enumerate(plan.sequences):
            tokens[row] = self._live[sequence.request.request_id].outputs[len(sequence.output_token_ids)]
        return tokens

    def _read(self, event: TokenEvent) -> None:
        """A token exists now."""
        request_id = event.sequence.request.request_id
        if len(event.sequence.output_token_ids) == 1:
            self.measured.ttfts.append(self.clock.now - self._live[request_id].submitted)
        if event.finish_reason is not None:
            del self._live[request_id]
            self.measured.finished += 1
            self._arrivals.finish(request_id, self.clock.now)

    def _read_totals(self) -> None:
        measured = self.measured
        measured.virtual_s = self.clock.now
        measured.preemptions = self.scheduler.num_preemptions
        measured.slabs_moved = self.cache.num_slabs_moved
        prefixes = self.scheduler.prefix_stats
        measured.prompt_tokens = prefixes.prompt_tokens
        measured.prefix_hit_tokens = prefixes.prefix_hit_tokens
        measured.rebuilt_tokens = prefixes.rebuilt_tokens
        measured.recomputed_tokens = prefixes.recomputed_tokens
        measured.hits = {kind: prefixes.hits[PrefixHit(kind)] for kind in HIT_KINDS}
        for pool in self.cache.stats():
            measured.released_early_blocks += pool.released_early_blocks
            measured.pools[pool.name] = {
                "num_blocks": pool.num_blocks,
                "peak_used_blocks": pool.peak_used_blocks,
                "block_bytes": pool.block_bytes,
            }
