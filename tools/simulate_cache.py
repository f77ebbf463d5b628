"""Replays a request trace through the engine's own scheduler and KV cache, without a device and without jax.

    python tools/simulate_cache.py --trace benchmarks/traces/docqa.jsonl \\
        --model-config benchmarks/models/gpt-oss-20b.json --kv-cache-memory 4GiB [--policy hybrid all-global] [--json]

It answers, for a model, a workload and a memory: how many requests run at once, how much of the prompts is found in
the cache, and how long a first token takes. Time is virtual: a step takes --step-ms, and --prefill-us more for each
token that is not a decode token; it is planned with the requests that have arrived, and its tokens exist at its end.
A trace has one JSON object a line (docs/simulator.md): arrival, the segments the prompt is made of, and how many tokens
are drawn; what is drawn is given by the trace, so that a later turn shares a real prefix with the answer before it.
With several policies one run is made for each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hkv_jax.config import EngineConfig, engine_options  # noqa: E402
from hkv_jax.errors import ConfigError  # noqa: E402
from tools.cache_simulation.measurements import Measurements  # noqa: E402
from tools.cache_simulation.model_geometry import read_geometry  # noqa: E402
from tools.cache_simulation.plot import Recorder, check_target  # noqa: E402
from tools.cache_simulation.policies import POLICIES  # noqa: E402
from tools.cache_simulation.replay import Replay, StuckError  # noqa: E402
from tools.cache_simulation.report import table  # noqa: E402
from tools.cache_simulation.simulation import Simulation  # noqa: E402
from tools.cache_simulation.trace import TraceError, read_trace  # noqa: E402
from tools.cache_simulation.virtual_clock import StepCost  # noqa: E402

SECONDS_BETWEEN_REPORTS = 10.0
ENGINE_OPTIONS = (
    *("kv_cache_memory", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_prefill_chunk", "block_size"),
    *("kv_partition", "expected_average_seq_length", "max_bypass_seconds", "max_prefix_wait_seconds"),
    *("tensor_parallel_size", "attention_backend", "kv_cache_dtype"),
)
"""Those of the engine's options that a simulation has."""


class Progress:
    """Tells on stderr how far a replay is, every few seconds of ``clock``."""

    def __init__(self, policy: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy, self._clock = policy, clock
        self._told = clock()

    def __call__(self, replay: Replay) -> None:
        now = self._clock()
        if now - self._told < SECONDS_BETWEEN_REPORTS:
            return
        self._told = now
        measured = replay.measured
        print(
            f"{self._policy}: {measured.finished} of {measured.requests} requests, step {measured.steps}, "
            f"{replay.clock.now:.0f} virtual seconds",
            file=sys.stderr,
        )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE", help="requests, one JSON object a line")
    parser.add_argument("--model-config", type=Path, required=True, metavar="FILE", help="a Hugging Face config.json")
    summaries = "; ".join(f"{policy.name}: {policy.summary}" for policy in POLICIES.values())
    words = {"choices": POLICIES, "default": ["hybrid"], "help": f"what to simulate (default: hybrid). {summaries}"}
    parser.add_argument("--policy", nargs="+", **words)  # type: ignore[arg-type]
    parser.add_argument("--json", action="store_true", help="one object a policy on stdout, and nothing else")
    text = "a picture of who fills the memory over time, and of the hits; with several policies, one for each"
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help=text)
    _add_clock_flags(parser)
    _add_engine_flags(parser)
    return parser


def _add_clock_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("virtual clock")
    cost = StepCost()
    group.add_argument("--step-ms", type=float, default=cost.step_ms, help="of a step (default: %(default)g)")
    text = "of a token that is not a decode token (default: %(default)g)"
    group.add_argument("--prefill-us", type=float, default=cost.prefill_us, help=text)
    text = "GB/s at which keys and values are moved (default: %(default)g)"
    group.add_argument("--copy-gbps", type=float, default=cost.copy_gbps, help=text)


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine", "limits and pages are those of a TPU unless told otherwise")
    for option in engine_options():
        if option.name in ENGINE_OPTIONS:
            text = f"{option.help} (default: {option.default_text})".replace("%", "%%")
            form: dict[str, Any] = {"metavar": option.kind.metavar}
            if option.kind.metavar is None:
                form = {"action": argparse.BooleanOptionalAction}
            group.add_argument(option.flag, dest=option.name, help=text, **form)
    text = "of the memory, for global layers; with --kv-partition static (default: as the engine splits)"
    group.add_argument("--set-static-share", type=float, metavar="SHARE", help=text)


def simulation_of(args: argparse.Namespace) -> Simulation:
    """What the flags ask for, under the engine's own policy.

    Raises:
        ConfigError: an option is out of range, or the model is not known.
        TraceError: the trace cannot be read.
    """
    return Simulation(
        requests=read_trace(args.trace),
        geometry=read_geometry(args.model_config),
        config=EngineConfig.from_options({name: getattr(args, name) for name in ENGINE_OPTIONS}),
        static_share=args.set_static_share,
        cost=StepCost(args.step_ms, args.prefill_us, args.copy_gbps),
    )


def _run(simulation: Simulation, args: argparse.Namespace) -> Measurements:
    progress = Progress(simulation.policy)
    if args.plot is None:
        return simulation.run(progress)
    replay = simulation.replay()
    recorder = Recorder(replay)

    def after_step(replay: Replay) -> None:
        progress(replay)
        recorder(replay)

    measured = replay.run(after_step)
    path = args.plot if len(args.policy) == 1 else args.plot.with_stem(f"{args.plot.stem}-{simulation.policy}")
    recorder.draw(path, f"{args.trace.stem}, {args.model_config.stem}, {simulation.policy}")
    print(f"wrote {path}", file=sys.stderr)
    return measured


def main() -> None:
    """Replays and prints."""
    parser = make_parser()
    args = parser.parse_args()
    failed, results = "", []
    try:
        if args.plot is not None:
            check_target(args.plot)
        simulation = simulation_of(args)
    except (ConfigError, TraceError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for name in args.policy:
        try:
            measured = _run(simulation.with_policy(name), args)
            results.append((name, measured))
            if refused := measured.requests - measured.finished:
                text = f"{name}: {refused} of {measured.requests} requests were refused: longer than max_model_len"
                print(text, file=sys.stderr)
        except (ConfigError, StuckError) as error:
            failed += f"{parser.prog}: {name}: {error}\n"
    if args.json:
        for _, measured in results:
            print(json.dumps(measured.to_json()))
    elif results:
        print(table(results))
    if failed:
        parser.exit(2, failed)


if __name__ == "__main__":
    main()
