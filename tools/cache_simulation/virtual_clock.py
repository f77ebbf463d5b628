"""Virtual time: what a step costs in a replay.

Owns: the clock and its rates. Must never: look at the real time.
"""

from __future__ import annotations

import dataclasses
import math

from hkv_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class StepCost:
    """How long a step takes: ``step_ms``, ``prefill_us`` a token that is not a decode token, ``copy_gbps`` GB/s.

    Raises:
        ConfigError: a rate is not above 0, or not finite.
    """

    step_ms: float = 25.0
    prefill_us: float = 20.0
    copy_gbps: float = 500.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            # Not a number compares as false.
            if not (0 < value < math.inf or (name == "prefill_us" and value == 0)):
                least = "at least" if name == "prefill_us" else "above"
                raise ConfigError(f"{name}: {value:g}; accepted: a number {least} 0")

    def seconds(self, prefill_tokens: int, copied_bytes: int) -> float:
        """The duration of a step with so many prefill tokens and bytes of K/V moved."""
        return self.step_ms / 1e3 + prefill_tokens * self.prefill_us / 1e6 + copied_bytes / (self.copy_gbps * 1e9)


class VirtualClock:
    """Seconds since the replay began; called as the engine calls ``time.monotonic``."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Now, in seconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Lets so much time pass."""
        self.now += seconds

    def wait_until(self, moment: float) -> None:
        """Lets time pass until ``moment``; the past is not reached again."""
        self.now = max(self.now, moment)
