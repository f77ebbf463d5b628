"""An engine driven by hand, for tests of single scheduling rules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hkv_jax.engine.batch import build
from hkv_jax.engine.plan import StepPlan
from hkv_jax.engine.request import Request
from hkv_jax.engine.step_result import StepResult
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.fake_engine import FakeEngineConfig, fake_engine


class HandDriven:
    """A scheduler whose plans are built as the engine builds them, and answered with tokens given by hand.

    ``now`` is its clock in seconds.
    """

    def __init__(self, config: FakeEngineConfig | None = None, policy: CachePolicy | None = None) -> None:
        """An idle engine for these limits."""
        self.now = 0.0
        self.engine = fake_engine(config, policy, lambda: self.now)
        self.scheduler, self.cache = self.engine.scheduler, self.engine.cache
        self._num_prompts = 0

    def add(self, name: str, prompt: int | Sequence[int], **params: object) -> None:
        """Queues a prompt of given tokens, or of so many that no other prompt begins with.

        ``params`` are those of ``SamplingParams``.
        """
        if isinstance(prompt, int):
            self._num_prompts += 1
            prompt = [self._num_prompts] * prompt
        self.scheduler.add(Request.create(name, prompt, SamplingParams(**params)))  # type: ignore[arg-type]

    def try_plan(self) -> StepPlan | None:
        """The next plan, built but not run, or ``None``."""
        plan = self.scheduler.schedule()
        if plan is not None:
            build(plan, self.cache, self.scheduler.lanes, self.engine.buckets)
        self.scheduler.check_invariants()
        return plan

    def plan(self) -> StepPlan:
        """The next plan, where there must be one."""
        plan = self.try_plan()
        assert plan is not None
        return plan

    def commit(self, plan: StepPlan, token: int = 9) -> list[TokenEvent]:
        """Every row of ``plan`` drew ``token``."""
        events = self.scheduler.commit(plan, StepResult(np.full(plan.num_rows, token, np.int32)))
        self.scheduler.check_invariants()
        return events

    def used_blocks(self) -> int:
        """Blocks held in all groups."""
        return sum(pool.used_blocks for pool in self.cache.stats())


def chunks_of(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    """(request id, start, end, whether it draws) of each chunk."""
    return [(chunk.sequence.request.request_id, chunk.start, chunk.end, chunk.samples) for chunk in plan.chunks]


def decoding(plan: StepPlan) -> list[str]:
    """Request ids of the decode rows."""
    return [sequence.request.request_id for sequence in plan.decode.sequences]
