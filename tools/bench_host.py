"""Host time of a decode step: schedule, build and commit, without a device and without jax.

Every cell runs an engine whose requests all decode, at one number of running requests, context length and queue length.
Cells take turns in rounds, so that a noisy moment hits all of them; a cell's figure is the median of its rounds.

    python tools/bench_host.py [--context 1024 8192 32768] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import statistics
import sys
import time

import numpy as np

from hkv_jax.engine.batch import build
from hkv_jax.engine.buckets import Buckets
from hkv_jax.engine.plan import StepPlan
from hkv_jax.engine.request import Request
from hkv_jax.engine.scheduler import Scheduler
from hkv_jax.engine.scheduler_config import SchedulerConfig
from hkv_jax.engine.step_result import StepResult
from hkv_jax.kvcache.format import PageLayout
from hkv_jax.kvcache.layout import LayoutRequest, plan_layout
from hkv_jax.kvcache.manager import CacheManager
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.spec import KVGroupSpec, LayerKind

# The groups of Gemma 3 270M.
GROUPS = (
    KVGroupSpec("global", LayerKind.GLOBAL, None, 1, 256, (5, 11, 17)),
    KVGroupSpec("sliding", LayerKind.SLIDING, 512, 1, 256, tuple(i for i in range(18) if i % 6 != 5)),
)
CHUNK = 2048
MAX_MICROSECONDS = 4.0
MAX_CONTEXT_SLOWDOWN = 0.20
MAX_MATCH_MILLISECONDS = 5.0
WAITING_TOKENS = 40_960
"""Tokens of a prompt that waits; none of them is cached, and each must be matched once."""

MATCHED_TOKENS = 131_072
MAX_QUEUE_SLOWDOWN = 0.10


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """What is measured: requests running, tokens of context of each, requests in the queue."""

    running: int
    context: int
    waiting: int


class Bench:
    """One engine in the state of a cell, driven as the real one is: planned one step ahead of what it commits."""

    def __init__(self, cell: Cell, steps: int) -> None:
        """Prefills every request; ``steps`` decode steps and more are possible afterwards."""
        self.cell = cell
        longest = max(cell.context + 64 * steps, WAITING_TOKENS) + CHUNK
        layout = plan_layout(_layout_request(cell.running, longest))
        self._cache = CacheManager(layout, cell.running)
        config = SchedulerConfig(cell.running, CHUNK + cell.running, CHUNK, longest, vocab_size=262_144)
        self._scheduler = Scheduler(config, self._cache)
        sizes = [group.format.block_size for group in layout.groups]
        self._buckets = Buckets(cell.running, config.max_num_batched_tokens, sizes)
        self._in_flight: StepPlan | None = None
        self.seconds = {"schedule": 0.0, "build": 0.0, "commit": 0.0}
        self._prefill()

    def step(self) -> None:
        """One step; adds what each part took to ``seconds``."""
        began = time.perf_counter()
        plan = self._scheduler.schedule()
        planned = time.perf_counter()
        assert plan is not None
        batch = build(plan, self._cache, self._scheduler.lanes, self._buckets)
        built = time.perf_counter()
        result = StepResult(np.zeros(batch.format.bucket.num_rows, np.int32))
        before = time.perf_counter()
        if self._in_flight is not None:
            self._scheduler.commit(self._in_flight, result)
        committed = time.perf_counter()
        self._in_flight = plan
        self.seconds["schedule"] += planned - began
        self.seconds["build"] += built - planned
        self.seconds["commit"] += committed - before

    def round(self, steps: int) -> dict[str, float]:
        """Microseconds a running request takes in a step, by part: the mean of ``steps`` steps."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        gc.collect()
        for _ in range(steps):
            self.step()
        return {part: 1e6 * seconds / steps / self.cell.running for part, seconds in self.seconds.items()}

    def _prefill(self) -> None:
        params = SamplingParams(seed=0, ignore_eos=True)
        for number in range(self.cell.running):
            # Lengths differ, so that requests begin new blocks at different steps, as they do in life.
            length = self.cell.context - 64 + (number * 37) % 64
            self._scheduler.add(Request.create(str(number), _prompt(number, length), params))
        while self._in_flight is None or self._in_flight.chunks:
            self.step()
        for number in range(self.cell.running, self.cell.running + self.cell.waiting):
            self._scheduler.add(Request.create(str(number), _prompt(number, WAITING_TOKENS), params))
        for _ in range(2):
            self.step()
        assert self._scheduler.num_running == self.cell.running, "the cell is not what it claims"


@functools.cache
def _prompt(number: int, length: int) -> tuple[int, ...]:
    """Tokens of the ``number``-th request, unlike those of all others; small ids, whose objects all prompts share."""
    return tuple(np.random.default_rng(number).integers(0, 256, length).tolist())


def match_milliseconds(rounds: int) -> float:
    """Median time to take in a prompt of 131,072 tokens that is cached: digests, match, and its place in the queue."""
    longest = MATCHED_TOKENS + CHUNK
    config = SchedulerConfig(1, CHUNK, CHUNK, longest, vocab_size=262_144)
    cache = CacheManager(plan_layout(_layout_request(1, longest)), 1)
    scheduler = Scheduler(config, cache)
    ids, params = _prompt(0, MATCHED_TOKENS), SamplingParams(seed=0, max_tokens=1)
    scheduler.add(Request.create("first", ids, params))
    while (plan := scheduler.schedule()) is not None:
        for group in range(len(cache.layout.groups)):
            cache.take_table_updates(group)
        scheduler.commit(plan, StepResult(np.zeros(plan.num_rows, np.int32)))
    seen = []
    for number in range(rounds):
        request = Request.create(str(number), ids, params)
        began = time.perf_counter()
        scheduler.add(request)
        seen.append(1e3 * (time.perf_counter() - began))
        scheduler.abort(request.request_id)
    return statistics.median(seen)


def _layout_request(running: int, longest: int) -> LayoutRequest:
    """A cache with room for everyone; only bookkeeping is allocated."""
    return LayoutRequest(
        groups=GROUPS,
        budget_bytes=(running + 2) * longest * 3 * 2 * 256 * 2 + (running + 8) * 2 * (512 + CHUNK) * 15 * 2 * 256 * 2,
        max_model_len=longest,
        config_max_len=longest,
        expected_average_seq_length=longest,
        block_sizes={},
        partition="moving",
        page_layout=PageLayout.ROWS,
        itemsize=2,
        tensor_parallel=1,
        max_chunk=CHUNK,
        max_num_seqs=running,
    )


def measure(cells: list[Cell], rounds: int, steps: int) -> dict[Cell, dict[str, float]]:
    """Medians over interleaved rounds, microseconds a running request a step, by part and in ``total``."""
    benches = [Bench(cell, steps * (rounds + 1)) for cell in cells]
    for bench in benches:
        bench.round(steps)
    gc.freeze()  # the queue and the tables are long-lived; a collection in a round should not walk them
    seen: dict[Cell, list[dict[str, float]]] = {cell: [] for cell in cells}
    for number in range(rounds):
        for bench in benches[number % len(benches) :] + benches[: number % len(benches)]:
            seen[bench.cell].append(bench.round(steps))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    parts = ("schedule", "build", "commit")
    medians = {}
    for cell, results in seen.items():
        medians[cell] = {part: statistics.median(result[part] for result in results) for part in parts}
        medians[cell]["total"] = statistics.median(sum(result.values()) for result in results)
    return medians


def goals(medians: dict[Cell, dict[str, float]]) -> list[tuple[str, float, float]]:
    """(what, measured, limit) of each goal that the cells measured can tell of."""
    totals = {cell: result["total"] for cell, result in medians.items()}
    most = max(cell.running for cell in totals)
    found = [
        (f"microseconds at {most} running, context {cell.context}", total, MAX_MICROSECONDS)
        for cell, total in totals.items()
        if cell.running == most and cell.waiting == 0
    ]
    contexts = sorted({cell.context for cell in totals})
    base = totals.get(Cell(most, contexts[0], 0))
    for context in contexts[1:]:
        total = totals.get(Cell(most, context, 0))
        if base is not None and total is not None:
            found.append((f"slower at context {context} than at {contexts[0]}", total / base - 1, MAX_CONTEXT_SLOWDOWN))
    for cell, total in totals.items():
        idle = totals.get(Cell(cell.running, cell.context, 0))
        if cell.running == most and cell.waiting and idle is not None:
            found.append(
                (f"slower with {cell.waiting} waiting, context {cell.context}", total / idle - 1, MAX_QUEUE_SLOWDOWN)
            )
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[16, 64, 256], help="running requests")
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192, 32768], help="tokens of each")
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 1000], help="requests in the queue")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100, help="decode steps of a round")
    parser.add_argument("--json", action="store_true", help="one object a cell on stdout, and nothing else")
    args = parser.parse_args()
    cells = [Cell(r, c, w) for r in args.running for c in args.context for w in args.waiting]
    medians = measure(cells, args.rounds, args.steps)
    if args.json:
        for cell, result in medians.items():
            print(json.dumps({**dataclasses.asdict(cell), **{part: round(value, 4) for part, value in result.items()}}))
        return
    print("microseconds a running request a step (medians)")
    print(f"{'running':>8}{'context':>9}{'waiting':>9}{'schedule':>10}{'build':>8}{'commit':>8}{'total':>8}")
    for cell, result in medians.items():
        parts = f"{result['schedule']:>10.2f}{result['build']:>8.2f}{result['commit']:>8.2f}{result['total']:>8.2f}"
        print(f"{cell.running:>8}{cell.context:>9}{cell.waiting:>9}{parts}")
    print()
    match = (f"milliseconds to match {MATCHED_TOKENS:,} cached tokens", match_milliseconds(9), MAX_MATCH_MILLISECONDS)
    for what, measured, limit in [*goals(medians), match]:
        print(f"{'ok  ' if measured <= limit else 'MISS'} {what}: {measured:.2f} (at most {limit:.2f})")


if __name__ == "__main__":
    main()
