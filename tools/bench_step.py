"""Tokens a second on the CPU: our engine, Hugging Face transformers and llama.cpp, taking turns on the same cores.

    python tools/bench_step.py [--cores 1 2] [--points decode1@128 prefill@1024 ...] [--work-dir FOLDER] [--json FILE]

Every peer stays loaded in a process of its own, pinned to the same cores, with as many threads. At each point all are
made ready, and then measure in rounds, A B C A B C, so that a noisy moment hits all of them. Our figure is that of the
whole engine: scheduler, tables, sampling, read-back. transformers runs forward and argmax, llama.cpp decode and argmax;
generate's own overhead is left out. All are greedy, in bf16 (llama.cpp: the same weights in bf16 and in f16, its
cache in f16). Every sequence of a batch has its own K/V: we compute different prompts, the others copy the first one's.

The first run makes an environment with torch and transformers (some 200 MB of wheels) and builds llama.cpp from source,
and ours compiles; with --work-dir, or --keep, the next run finds all of it. A full run takes about half an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.real_prompts import english  # noqa: E402
from tools.step_bench import environments, machine  # noqa: E402
from tools.step_bench.points import GOALS, HKV_JAX, LLAMA, TRANSFORMERS, Outcome, Point  # noqa: E402
from tools.step_bench.report import CoreResults, ModelBytes, Report  # noqa: E402
from tools.step_bench.workers import PeerSpec, Worker, WorkerFailedError, read_bandwidth  # noqa: E402
from tools.throwaway_env import reference_python, say  # noqa: E402

PACKAGE = "tools.step_bench"
UNTIMED_STEPS = 2
BANDWIDTH_BYTES = 1 << 30
LLAMA_TYPES = ("f16/f16", "bf16/f16")


def main() -> int:
    """Makes what is missing, measures, prints."""
    options = _parser().parse_args()
    if not (options.model / "config.json").exists():
        say(f"no model in {options.model}; tools/make_real_models.py makes it")
        return 2
    if max(options.cores) > len(machine.available_cores()):
        say(f"--cores {max(options.cores)}: this process may use only cores {machine.available_cores()}")
        return 2
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_work_folder(options.work_dir, options.keep))
        python = options.transformers_python or stack.enter_context(
            reference_python((), folder=folder / "transformers")
        )
        report = _empty_report(options.model)
        peers = [
            PeerSpec(HKV_JAX, Path(sys.executable), f"{PACKAGE}.peer_hkv", options.model, _engine_options(options)),
            PeerSpec(TRANSFORMERS, python, f"{PACKAGE}.peer_transformers", options.model),
            *_llama_peers(options, folder, report),
        ]
        report.peers = [peer.name for peer in peers]
        try:
            for num_cores in options.cores:
                _measure_on(machine.available_cores()[:num_cores], peers, folder, options, report)
        except KeyboardInterrupt:
            say("interrupted; this is what was measured")
        except WorkerFailedError as error:
            say(str(error))
            return 1
        finally:
            _write(options, report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "gemma-3-270m", help="a gemma3_text folder")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of cores to run on")
    parser.add_argument(
        "--points", type=_point, nargs="+", default=list(GOALS), metavar="POINT", help="default: all that have a goal"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed decode steps of a round")
    parser.add_argument("--skip-llama", action="store_true", help="leave llama.cpp out")
    parser.add_argument(
        "--llama",
        nargs="+",
        default=LLAMA_TYPES,
        choices=[f"{weights}/{cache}" for weights in ("f16", "bf16") for cache in ("f16", "bf16")],
        metavar="WEIGHTS/CACHE",
        help=f"types it runs with, of f16 and bf16; the best counts (default: {' '.join(LLAMA_TYPES)}; a cache in bf16 "
        "was slower where this was tried)",
    )
    parser.add_argument("--work-dir", type=Path, help="for environments, weights, programs; kept, and used again")
    parser.add_argument("--keep", action="store_true", help="keep the temporary work folder")
    parser.add_argument("--transformers-python", type=Path, help="interpreter that has torch and transformers")
    parser.add_argument("--llama-python", type=Path, help="interpreter that has llama-cpp-python and gguf")
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an engine option, as max_prefill_chunk=1024",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, after each point")
    return parser


def _point(text: str) -> Point:
    try:
        return Point.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@contextlib.contextmanager
def _work_folder(given: Path | None, keep: bool) -> Iterator[Path]:
    """The folder given, or a temporary one, removed unless it is to be kept."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="hkv-jax-bench-"))
    try:
        yield folder
    finally:
        if keep:
            say(f"the work folder stays: --work-dir {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """Defaults of the CPU, with room for every point; what the command line sets beats it."""
    longest = max(point.tokens for point in options.points)
    wanted = max([point.batch * point.tokens for point in options.points] + [longest])
    drawn = UNTIMED_STEPS + options.rounds * (options.steps + UNTIMED_STEPS) + 64
    batch = max(1, *(point.batch for point in options.points))
    chosen: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": longest + drawn,
        "max_num_seqs": batch,
        "expected_average_seq_length": -(-wanted // batch) + drawn,
        "kv_cache_memory": "1GiB",
    }
    return chosen | dict(setting.split("=", 1) for setting in options.engine)


def _llama_peers(options: argparse.Namespace, folder: Path, report: Report) -> list[PeerSpec]:
    """One a pair of types; where llama.cpp cannot be built the report says so."""
    if options.skip_llama:
        report.missing[LLAMA] = "left out on request"
        return []
    try:
        python = options.llama_python or environments.llama_python(folder / "llama", folder / "llama-build.log")
        return [
            PeerSpec(
                f"{LLAMA} {weights}/{cache}",
                python,
                f"{PACKAGE}.peer_llama",
                environments.gguf_file(python, options.model, folder, weights),
                {"cache": cache},
            )
            for weights, cache in (types.split("/") for types in options.llama)
        ]
    except environments.BuildFailedError as error:
        say(f"{LLAMA}: {error}")
        report.missing[LLAMA] = str(error)
        return []


def _empty_report(model: Path) -> Report:
    from hkv_jax.families import read_model_spec

    spec = read_model_spec(model)
    itemsize = 2
    groups = tuple(
        (2 * group.num_layers * group.num_kv_heads * group.head_dim * itemsize, group.window)
        for group in spec.kv_groups()
    )
    weights = sum(_tensor_bytes(file) for file in model.glob("*.safetensors"))
    return Report(model.name, ModelBytes(weights, groups), machine.describe_cpu(), os.getloadavg()[0], peers=[])


def _tensor_bytes(file: Path) -> int:
    """Bytes of a safetensors file without its header."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def _measure_on(
    cores: list[int], peers: Sequence[PeerSpec], folder: Path, options: argparse.Namespace, report: Report
) -> None:
    """Loads every peer, and measures all points."""
    result = CoreResults(cores, machine.share_hardware(cores))
    report.results.append(result)
    transformers = next(peer for peer in peers if peer.name == TRANSFORMERS)
    prompts = Prompts(options.model)
    say(f"cores {cores}: reading {BANDWIDTH_BYTES >> 20} MiB")
    with contextlib.ExitStack() as stack:
        bandwidth = read_bandwidth(transformers.python, cores, folder, BANDWIDTH_BYTES)
        result.bandwidth = stack.enter_context(bandwidth)
        workers = []
        for peer in peers:
            say(f"cores {cores}: loading {peer.name}")
            worker = stack.enter_context(Worker(peer, cores, folder))
            report.versions |= worker.versions
            workers.append(worker)
        for number, point in enumerate(options.points):
            began = time.monotonic()
            result.outcomes[point] = measure(point, workers, prompts, options.rounds, options.steps)
            rates = (f"{peer} {one.tokens_per_second(point):.1f}" for peer, one in result.outcomes[point].items())
            done = f"{number + 1} of {len(options.points)}, {time.monotonic() - began:.0f} s"
            say(f"cores {cores}: {point}: {', '.join(rates)} tokens/s ({done})")
            _write_json(options.json, report)


class Prompts:
    """Token ids of English text."""

    def __init__(self, model: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def __call__(self, length: int, story: int) -> list[int]:
        """Exactly ``length`` ids; other stories are other texts."""
        ids: list[int] = self._tokenizer.encode(english(length, story)).ids[:length]
        return ids


def measure(point: Point, workers: Sequence[Worker], prompts: Prompts, rounds: int, steps: int) -> dict[str, Outcome]:
    """All peers at one point, in turns."""
    if point.decodes:
        return _measure_decode(point, workers, prompts, rounds, steps)
    return _measure_prefill(point, workers, prompts, rounds)


def _measure_decode(
    point: Point, workers: Sequence[Worker], prompts: Prompts, rounds: int, steps: int
) -> dict[str, Outcome]:
    batch = [prompts(point.tokens, story) for story in range(point.batch)]
    outcomes = {worker.spec.name: Outcome() for worker in workers}
    for worker in workers:
        say(f"  {point}: {worker.spec.name} prefills")
        worker.ask("start", prompts=batch)
    for _ in range(rounds):
        for worker in workers:
            _note(outcomes[worker.spec.name], worker.ask("steps", untimed=UNTIMED_STEPS, timed=steps))
    for worker in workers:
        worker.ask("stop")
    return outcomes


def _measure_prefill(point: Point, workers: Sequence[Worker], prompts: Prompts, rounds: int) -> dict[str, Outcome]:
    outcomes = {worker.spec.name: Outcome() for worker in workers}
    for worker in workers:
        worker.ask("prefill", prompt=prompts(point.tokens, 0))
    # Another text each round, so that no cache of prompts can answer.
    for story in range(1, rounds + 1):
        for worker in workers:
            _note(outcomes[worker.spec.name], worker.ask("prefill", prompt=prompts(point.tokens, story)))
    for worker in workers:
        worker.ask("stop")
    return outcomes


def _note(outcome: Outcome, answer: dict[str, Any]) -> None:
    outcome.rounds.append(answer["seconds"])
    outcome.cpu_rounds.append(answer["cpu_seconds"])
    outcome.tokens += answer["tokens"]
    if answer["others"] is not None:
        outcome.others.append(answer["others"])


def _write(options: argparse.Namespace, report: Report) -> None:
    """The tables on stdout, and files where they are wanted."""
    text = report.markdown()
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    _write_json(options.json, report)


def _write_json(file: Path | None, report: Report) -> None:
    if file is not None:
        file.write_text(json.dumps(report.json(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
