"""The simulator as a command: JSON, table, picture, refusals; and it needs no jax."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools import simulate_cache
from tools.cache_simulation.trace import TraceRequest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "simulate_cache.py"
CONFIG = ROOT / "benchmarks" / "models" / "gpt-oss-20b.json"

# The oldest supported versions are tested without it.
NEEDS_MATPLOTLIB = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    requests = [
        TraceRequest(f"r{i}", 2.0 * i, None, 0.0, (("document", 4000), (f"question{i}", 40)), 20) for i in range(4)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(request.to_json() for request in requests), encoding="utf-8")
    return path


def flags(trace: Path, *more: str) -> list[str]:
    memory = ["--kv-cache-memory", "512MiB", "--max-model-len", "8192", "--max-num-batched-tokens", "2048"]
    return ["--trace", str(trace), "--model-config", str(CONFIG), *memory, *more]


def run(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate_cache.py", *arguments])
    simulate_cache.main()


def test_one_object_a_policy_on_stdout_and_nothing_else_and_jax_stays_away(trace: Path) -> None:
    program = f"""
import runpy, sys
sys.argv = ["simulate_cache.py", *{flags(trace, "--json", "--policy", "hybrid", "no-cache")!r}]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
assert not {{"jax", "matplotlib"}} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=trace.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ours, without = (json.loads(line) for line in done.stdout.splitlines())
    assert ours["finished"] == without["finished"] == 4
    # Three questions find all full blocks of the document and compute the rest.
    assert ours["prefix_hit_tokens"] == 3 * (4000 // 64 * 64)
    assert ours["hits"] == {"resident": 3, "rebuild": 0, "truncate": 0, "miss": 1}
    assert without["prefix_hit_tokens"] == 0
    assert ours["computed_prompt_tokens"] == 4 * 4040 - ours["prefix_hit_tokens"]
    assert ours["ttft_mean_s"] < without["ttft_mean_s"]


def test_the_table_has_a_column_a_policy(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, flags(trace, "--policy", "hybrid", "all-global"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["hybrid", "all-global"]
    rows = {line[:45].strip(): line[45:].split() for line in lines[1:]}
    assert rows["preemptions"] == ["0", "0"]
    assert rows["prompt tokens"] == ["16160", "16160"]
    assert len(rows["sliding blocks held, peak (owned at the end)"]) == 2  # peak and end, of one policy


@NEEDS_MATPLOTLIB
def test_a_picture_of_the_run(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, flags(trace, "--plot", str(tmp_path / "run.png"), "--policy", "hybrid", "no-tails"))
    for policy in ("hybrid", "no-tails"):
        assert (tmp_path / f"run-{policy}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--kv-cache-memory", "lots"], "kv_cache_memory is 'lots'; accepted: bytes, as 2GiB"),
        (["--kv-cache-memory", "1MiB"], "do not hold one sequence of max_model_len 8192"),
        (["--step-ms", "0"], "step_ms: 0; accepted: a number above 0"),
        (["--copy-gbps", "inf"], "copy_gbps: inf; accepted: a number above 0"),
        (["--prefill-us", "nan"], "prefill_us: nan; accepted: a number at least 0"),
        (["--set-static-share", "0.5"], "needs --kv-partition static"),
        (["--set-static-share", "nan", "--kv-partition", "static"], "set_static_share: nan; accepted: a number betw"),
        pytest.param(
            ["--plot", "nowhere/run.png"],
            "plot: nowhere/run.png cannot be written: nowhere is no folder",
            marks=NEEDS_MATPLOTLIB,
        ),
        pytest.param(["--plot", "run.xyz"], "plot: run.xyz must end in one of .", marks=NEEDS_MATPLOTLIB),
        (["--model-config", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
    ],
)
def test_refusals_are_one_line(
    trace: Path,
    more: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, flags(trace, *more))
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not shown.out


def test_what_a_policy_did_is_told_though_another_does_not_fit(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--kv-cache-memory", "320MiB", "--policy", "all-global", "hybrid", "--json")
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, flags(trace, *small))
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["finished"] == 4
    assert "all-global: " in shown.err


def test_requests_that_are_too_long_are_told(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, flags(trace, "--max-model-len", "2048", "--json"))
    shown = capsys.readouterr()
    assert json.loads(shown.out)["finished"] == 0
    assert "hybrid: 4 of 4 requests were refused" in shown.err


def test_memory_has_to_be_given(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, ["--trace", str(trace), "--model-config", str(CONFIG)])
    assert "kv_cache_memory is not set" in capsys.readouterr().err


def test_progress_is_told_now_and_then(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 3.0, 11.0, 12.0, 25.0])
    progress = simulate_cache.Progress("hybrid", lambda: next(clock))
    replay = simulate_cache.simulation_of(simulate_cache.make_parser().parse_args(flags(trace))).replay()
    for _ in range(4):
        replay.step()
        progress(replay)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert told[0].startswith("hybrid: 0 of 4 requests, step 2, ")
