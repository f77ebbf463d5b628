"""A whole engine without a device, for tests of scheduling and of everything above the engine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from hkv_jax.engine.buckets import Buckets
from hkv_jax.engine.engine import Engine
from hkv_jax.engine.scheduler_config import SchedulerConfig
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.kvcache.format import PageLayout
from hkv_jax.kvcache.layout import KVLayout, LayoutRequest, plan_layout
from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.spec import KVGroupSpec, LayerKind
from hkv_jax.testing.fake_runner import FakeRunner


def global_group(num_layers: int = 1) -> KVGroupSpec:
    """A small group of layers that attend to everything."""
    return KVGroupSpec("global", LayerKind.GLOBAL, None, 1, 8, tuple(range(num_layers)))


def sliding_group(window: int, num_layers: int = 2, name: str = "sliding") -> KVGroupSpec:
    """A small group of layers that attend to ``window`` tokens; its pages are larger than those of ``global_group``."""
    return KVGroupSpec(name, LayerKind.SLIDING, window, 2, 8, tuple(range(num_layers)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeEngineConfig:
    """Limits of a fake engine, named as the real options; blocks are small, so that much happens in few steps."""

    groups: tuple[KVGroupSpec, ...] = (global_group(), sliding_group(10))
    kv_cache_memory: int = 2**20
    kv_partition: str = "moving"
    block_size: tuple[tuple[str, int], ...] = (("global", 8), ("sliding", 4))
    max_model_len: int = 128
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 32
    max_prefill_chunk: int = 32
    vocab_size: int = 97
    max_bypass_seconds: float = 30.0
    max_prefix_wait_seconds: float = 30.0

    def layout(self) -> KVLayout:
        """The cache's layout for these limits."""
        kinds = {str(group.kind) for group in self.groups}
        return plan_layout(
            LayoutRequest(
                groups=self.groups,
                budget_bytes=self.kv_cache_memory,
                max_model_len=self.max_model_len,
                config_max_len=self.max_model_len,
                expected_average_seq_length=None,
                block_sizes={name: size for name, size in self.block_size if name in kinds},
                partition=self.kv_partition,
                page_layout=PageLayout.ROWS,
                itemsize=4,
                tensor_parallel=1,
                max_chunk=self.max_prefill_chunk,
                max_num_seqs=self.max_num_seqs,
            )
        )

    def scheduler_config(self) -> SchedulerConfig:
        """The scheduler's part of them."""
        return SchedulerConfig(
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.max_prefill_chunk,
            self.max_model_len,
            self.vocab_size,
            self.max_bypass_seconds,
            self.max_prefix_wait_seconds,
        )


def tight_config(num_blocks: int, max_model_len: int) -> FakeEngineConfig:
    """A cache of ``num_blocks`` blocks of 8 tokens in a single global group."""
    block_bytes = 2 * 8 * 8 * 4
    memory = num_blocks * block_bytes
    return FakeEngineConfig(groups=(global_group(),), kv_cache_memory=memory, max_model_len=max_model_len)


def fake_engine(
    config: FakeEngineConfig | None = None,
    policy: CachePolicy | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Engine:
    """An idle engine over a ``FakeRunner``; ``clock`` counts seconds."""
    config = config or FakeEngineConfig()
    layout = config.layout()
    buckets = Buckets(config.max_num_seqs, config.max_num_batched_tokens, layout.block_sizes)
    runner = FakeRunner(layout, buckets, config.max_num_seqs, config.vocab_size)
    return Engine.over(layout, config.scheduler_config(), runner, policy, clock)


def run_to_end(engine: Engine) -> dict[tuple[str, int], list[TokenEvent]]:
    """Steps until nothing is left to do, with the invariants checked after every step.

    Returns the events of each sample, by request id and sample.

    Raises:
        AssertionError: an invariant broke, or something holds blocks although nothing runs.
    """
    events: dict[tuple[str, int], list[TokenEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            key = event.sequence.request.request_id, event.sequence.sample
            events.setdefault(key, []).append(event)
        engine.scheduler.check_invariants()
    assert all(pool.used_blocks == 0 for pool in engine.cache.stats()), "M2: blocks are held by nobody"
    return events
