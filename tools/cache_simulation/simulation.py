"""One simulation: what is replayed, on which cache, under which policy.

Owns: bringing the parts together, so that a command and a worker process run the same thing. Must never: parse flags.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from hkv_jax.config import EngineConfig
from hkv_jax.kvcache.manager import CacheManager
from tools.cache_simulation.measurements import Measurements
from tools.cache_simulation.model_geometry import ModelGeometry
from tools.cache_simulation.policies import POLICIES
from tools.cache_simulation.replay import Replay
from tools.cache_simulation.simulated_cache import simulated_layout, simulated_limits
from tools.cache_simulation.trace import TraceRequest
from tools.cache_simulation.virtual_clock import StepCost


@dataclasses.dataclass(frozen=True)
class Simulation:
    """A trace, a model, the engine's options, a policy of ``POLICIES``; see ``simulated_layout`` for the rest."""

    requests: Sequence[TraceRequest]
    geometry: ModelGeometry
    config: EngineConfig
    policy: str = "hybrid"
    static_share: float | None = None
    cost: StepCost = dataclasses.field(default_factory=StepCost)

    def with_policy(self, policy: str) -> Simulation:
        """The same under another policy."""
        return dataclasses.replace(self, policy=policy)

    def replay(self) -> Replay:
        """The run, ready to go.

        Raises:
            ConfigError: memory does not suffice, or an option is out of range.
        """
        policy = POLICIES[self.policy]
        layout = simulated_layout(self.config, policy.geometry(self.geometry), self.static_share)
        limits = simulated_limits(self.config, layout)
        cache = CacheManager(layout, limits.max_num_seqs, policy.cache_policy())
        return Replay(self.requests, cache, limits, self.cost)

    def run(self, after_step: Callable[[Replay], None] | None = None) -> Measurements:
        """The whole run; ``after_step`` sees the replay after each step.

        Raises:
            ConfigError: as ``replay``.
            StuckError: it has no end.
        """
        return self.replay().run(after_step)
