"""What the cache benchmark runs: workloads on models, and the ways of keeping a cache that are compared.

Owns: cases, runs, and how one run is made into a ``Simulation``. Must never: judge a result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from hkv_jax.config import EngineConfig
from hkv_jax.errors import ConfigError
from tools.cache_simulation.generators import GENERATORS
from tools.cache_simulation.model_geometry import ModelGeometry, read_geometry
from tools.cache_simulation.simulation import Simulation
from tools.cache_simulation.trace import TraceRequest, read_trace

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MAX_NUM_SEQS = 1024
MAX_NUM_BATCHED_TOKENS = 8192

Result = Mapping[str, object]
"""What ``Measurements.to_json`` returns."""


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Case:
    """A trace on a model with ``kv_gib`` GiB of KV cache.

    ``seed`` of ``None``: the trace of ``benchmarks/traces``; a number: one of its kind, generated.
    """

    trace: str
    model: str
    kv_gib: float
    seed: int | None = None

    def __str__(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.trace}, {self.model}, {self.kv_gib:g} GiB{seed}"

    @property
    def max_model_len(self) -> int:
        """Tokens; chats are short."""
        return 16_384 if self.trace == "chat" else 65_536

    @property
    def kv_cache_memory(self) -> int:
        """Bytes."""
        return int(self.kv_gib * 2**30)

    def requests(self) -> Sequence[TraceRequest]:
        """The trace."""
        return _requests(self.trace, self.seed)

    def geometry(self) -> ModelGeometry:
        """The model."""
        return geometry_of(self.model)

    def mean_length(self) -> int:
        """Tokens of a request, prompt and output, on average over the trace."""
        requests = self.requests()
        return round(sum(one.prompt_len + one.output_len for one in requests) / len(requests))


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Run:
    """A case under a policy of ``tools.cache_simulation.policies``, with the boundary between the pools as told.

    ``share`` is the share of the memory that global layers get in a static split, ``expected`` the engine's
    ``expected_average_seq_length``; ``None`` as the engine would choose.
    """

    case: Case
    policy: str = "hybrid"
    partition: str = "moving"
    expected: int | None = None
    share: float | None = None

    def __str__(self) -> str:
        parts = [str(self.case), self.policy, self.partition]
        if self.expected is not None:
            parts.append(f"E {self.expected}")
        if self.share is not None:
            parts.append(f"share {self.share:.3f}")
        return ", ".join(parts)

    def simulation(self) -> Simulation:
        """The run as a simulation."""
        # Without windows a sequence takes so much that only what the trace has can be asked for.
        longest = max(one.prompt_len + one.output_len for one in self.case.requests())
        config = EngineConfig(
            kv_cache_memory=self.case.kv_cache_memory,
            max_model_len=longest if self.policy == "all-global" else self.case.max_model_len,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            kv_partition=self.partition,
            expected_average_seq_length=self.expected,
        )
        return Simulation(self.case.requests(), self.case.geometry(), config, self.policy, self.share)


def measure(run: Run) -> Result | None:
    """The result of a run; ``None`` where the memory does not hold the longest request."""
    simulation = run.simulation()
    try:
        replay = simulation.replay()
    except ConfigError:
        return None
    return replay.run().to_json()


@functools.lru_cache(maxsize=4)
def _requests(trace: str, seed: int | None) -> Sequence[TraceRequest]:
    return GENERATORS[trace](seed) if seed is not None else read_trace(BENCHMARKS / "traces" / f"{trace}.jsonl")


@functools.cache
def geometry_of(model: str) -> ModelGeometry:
    """One of the models of ``benchmarks/models``."""
    return read_geometry(BENCHMARKS / "models" / f"{model}.json")
