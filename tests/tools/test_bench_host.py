"""The host benchmark measures what it says, and needs no jax. No time is asserted here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "bench_host.py"
SMALL = ["--running", "2", "3", "--context", "200", "--waiting", "0", "4", "--rounds", "1", "--steps", "3"]


@pytest.fixture
def bench_host(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_host", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_host", module)
    spec.loader.exec_module(module)
    return module


def test_every_cell_is_printed_and_jax_stays_away() -> None:
    program = f"""
import runpy, sys
sys.argv = ["bench_host", "--json", *{SMALL!r}]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
assert "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["running"], row["waiting"]) for row in rows] == [(2, 0), (2, 4), (3, 0), (3, 4)]
    assert all(row["schedule"] > 0 and row["build"] > 0 and row["commit"] > 0 for row in rows)


def test_goals_compare_the_largest_number_of_requests(bench_host: ModuleType) -> None:
    cell = bench_host.Cell
    totals = {
        cell(16, 1024, 0): 9.0,
        cell(256, 1024, 0): 2.0,
        cell(256, 1024, 1000): 2.5,
        cell(256, 32768, 0): 2.2,
    }
    found = bench_host.goals({each: {"total": total} for each, total in totals.items()})
    measured = {what: (round(value, 6), limit) for what, value, limit in found}
    assert measured == {
        "microseconds at 256 running, context 1024": (2.0, 4.0),
        "microseconds at 256 running, context 32768": (2.2, 4.0),
        "slower at context 32768 than at 1024": (0.1, 0.2),
        "slower with 1000 waiting, context 1024": (0.25, 0.1),
    }
