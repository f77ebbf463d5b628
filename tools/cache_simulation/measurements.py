"""What a replay saw, and the object that ``--json`` prints.

Owns: counters, and the names under which they are reported. Must never: decide anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

HIT_KINDS = ("resident", "rebuild", "truncate", "miss")


@dataclasses.dataclass(slots=True)
class Measurements:
    """Counters of one replay; times are virtual seconds, but for ``host_seconds``.

    Attributes:
        requests, finished: of the trace; the difference was refused or cut off.
        running: sequences with a lane after each step's plan.
        scheduled: rows of all steps.
        host_seconds: real time in the scheduler and the cache.
        ttfts: from the step boundary at which a request was submitted to the end of the step that drew its first token.
        pools: by name of a group: ``num_blocks``, ``peak_used_blocks``, ``block_bytes``.
    """

    requests: int
    finished: int = 0
    steps: int = 0
    virtual_s: float = 0.0
    running_sum: int = 0
    peak_running: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    rebuilt_tokens: int = 0
    recomputed_tokens: int = 0
    hits: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(HIT_KINDS, 0))
    pools: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    released_early_blocks: int = 0
    slabs_moved: int = 0
    copied_bytes: int = 0
    ttfts: list[float] = dataclasses.field(default_factory=list)
    scheduled: int = 0
    host_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Prompt tokens not computed, as a share of all."""
        return self.prefix_hit_tokens / max(1, self.prompt_tokens)

    def to_json(self) -> Mapping[str, object]:
        """The report: counts, virtual seconds, and host microseconds a row of a step."""
        ttfts = np.array(self.ttfts or [0.0])
        median, late = np.percentile(ttfts, [50, 99])
        return {
            "requests": self.requests,
            "finished": self.finished,
            "steps": self.steps,
            "virtual_s": round(self.virtual_s, 6),
            "peak_running": self.peak_running,
            "mean_running": round(self.running_sum / max(1, self.steps), 4),
            "preemptions": self.preemptions,
            "prompt_tokens": self.prompt_tokens,
            "prefix_hit_tokens": self.prefix_hit_tokens,
            "rebuilt_tokens": self.rebuilt_tokens,
            "computed_prompt_tokens": self.prompt_tokens - self.prefix_hit_tokens,
            "recomputed_tokens": self.recomputed_tokens,
            "hits": dict(self.hits),
            "pools": self.pools,
            "released_early_blocks": self.released_early_blocks,
            "slabs_moved": self.slabs_moved,
            "copied_bytes": self.copied_bytes,
            "ttft_p50_s": round(float(median), 6),
            "ttft_p99_s": round(float(late), 6),
            "ttft_mean_s": round(float(ttfts.mean()), 6),
            "host_us_per_scheduled_request": round(1e6 * self.host_seconds / max(1, self.scheduled), 3),
        }
