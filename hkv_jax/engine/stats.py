"""What the engine has done and is doing, in numbers.

Owns: the figures the Python face, the command line and the metrics show. Must never: be read while the loop thread
makes it (it is replaced whole after each step).
"""

from __future__ import annotations

import dataclasses

from hkv_jax.engine.engine import Engine
from hkv_jax.engine.prefix_stats import PrefixStats
from hkv_jax.engine.request import Request
from hkv_jax.kvcache.manager import PoolStats


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine now, and counts since its start.

    Attributes:
        num_running: sequences (samples of requests) in the batch.
        num_waiting: sequences that wait for a place in it.
        num_requests: requests that are not over; num_finished_requests: those that are, in whatever way.
        num_added_requests, num_prompt_tokens: requests taken so far, and tokens of their prompts.
        num_output_tokens: tokens drawn.
        num_preemptions: times a sequence gave its blocks up and was computed again.
        pools: blocks of each attention group.
        prefix: what the prefix cache has saved.
        num_slabs_moved: times a part of the memory went from one pool to another.
        copied_bytes: bytes that one device copied for that, since blocks of the other pool lay there.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_requests: int = 0
    num_finished_requests: int = 0
    num_added_requests: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    pools: tuple[PoolStats, ...] = ()
    prefix: PrefixStats = dataclasses.field(default_factory=PrefixStats)
    num_slabs_moved: int = 0
    copied_bytes: int = 0

    @classmethod
    def of(cls, engine: Engine) -> EngineStats:
        """Of an engine that has done nothing."""
        return cls(pools=engine.cache.stats())

    def after_add(self, request: Request) -> EngineStats:
        """With one more request taken."""
        return dataclasses.replace(
            self,
            num_added_requests=self.num_added_requests + 1,
            num_prompt_tokens=self.num_prompt_tokens + request.prompt_len,
        )

    def after_step(self, engine: Engine, num_tokens: int) -> EngineStats:
        """After a step that brought ``num_tokens`` output tokens."""
        return dataclasses.replace(
            self,
            num_running=engine.scheduler.num_running,
            num_waiting=engine.scheduler.num_waiting,
            num_output_tokens=self.num_output_tokens + num_tokens,
            num_preemptions=engine.scheduler.num_preemptions,
            pools=engine.cache.stats(),
            prefix=engine.scheduler.prefix_stats,
            num_slabs_moved=engine.cache.num_slabs_moved,
            copied_bytes=engine.cache.copied_bytes,
        )
