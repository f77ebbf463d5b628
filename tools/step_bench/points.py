"""What the step benchmark measures, and what is asked of it.

Owns: the points, their goals, the outcome of one peer at one point. Must never: run anything.
"""

from __future__ import annotations

import dataclasses
import re
import statistics

HKV_JAX = "hkv-jax"
TRANSFORMERS = "transformers"
LLAMA = "llama.cpp"
"""First word of the names of all peers that run llama.cpp; the second says the type of weights and cache."""


@dataclasses.dataclass(frozen=True, order=True)
class Point:
    """Decoding ``batch`` sequences with ``tokens`` of context each, or prefilling ``tokens`` of one (batch 0)."""

    batch: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Point:
        """Reads ``decode8@1024`` or ``prefill@1024``.

        Raises:
            ValueError: it is neither, or a number is 0.
        """
        match = re.fullmatch(r"(?:decode([1-9]\d*)|prefill)@([1-9]\d*)", text)
        if match is None:
            raise ValueError(f"{text!r} is no point; write decode8@1024 (batch, context) or prefill@1024 (prompt)")
        return cls(int(match[1] or 0), int(match[2]))

    def __str__(self) -> str:
        return f"decode{self.batch}@{self.tokens}" if self.decodes else f"prefill@{self.tokens}"

    @property
    def decodes(self) -> bool:
        """Whether it is a decode step, not a prefill."""
        return self.batch > 0

    @property
    def tokens_a_step(self) -> int:
        """Tokens that one timed step yields (decode) or takes in (prefill)."""
        return self.batch or self.tokens


@dataclasses.dataclass(frozen=True)
class Goal:
    """Least ratios of our tokens/s to the other's: to transformers, and to the best of llama.cpp where one is set."""

    transformers: float
    llama: float | None = None


GOALS = {
    Point(1, 128): Goal(1.8, 1.1),
    Point(1, 1024): Goal(1.8, 1.1),
    Point(1, 4096): Goal(1.7, 1.0),
    Point(8, 128): Goal(1.7, 1.5),
    Point(8, 1024): Goal(1.5, 1.3),
    Point(16, 128): Goal(1.5, 1.8),
    Point(16, 1024): Goal(1.25, 1.4),
    Point(0, 128): Goal(1.3),
    Point(0, 1024): Goal(1.1),
    Point(0, 4096): Goal(1.4),
}


@dataclasses.dataclass
class Outcome:
    """What one peer did at one point.

    Attributes:
        rounds: seconds of each timed step, round by round.
        cpu_rounds: CPU seconds of its process in the same; on one core, what a step would take if nobody disturbed it.
        tokens: greedy tokens of the first sequence, from the first on; of a prefill, the next token of each round.
        others: CPU seconds that other processes took of the cores in each round, as a share of its time.
    """

    rounds: list[list[float]] = dataclasses.field(default_factory=list)
    cpu_rounds: list[list[float]] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    others: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of a step: the median of the rounds' medians."""
        return statistics.median(statistics.median(seconds) for seconds in self.rounds)

    def tokens_per_second(self, point: Point) -> float:
        """The figure that is compared."""
        return point.tokens_a_step / self.seconds


def best_llama(rates: dict[str, float]) -> float | None:
    """The fastest of llama.cpp's configurations, by peer name; ``None`` when there is none."""
    return max((rate for peer, rate in rates.items() if peer.startswith(LLAMA)), default=None)


def same_tokens(point: Point, mine: list[int], theirs: list[int]) -> int:
    """How many tokens agree: of a decode before the first that does not, since all that follow depend on it."""
    equal = [a == b for a, b in zip(mine, theirs, strict=False)]
    if point.decodes and False in equal:
        return equal.index(False)
    return sum(equal)
