"""Traces from the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import make_trace
from tools.cache_simulation.generators import GENERATORS
from tools.cache_simulation.trace import parse_trace, read_trace


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["make_trace.py", *arguments])
    make_trace.main()


def test_a_trace_in_a_file_or_on_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "docs.jsonl"
    run(monkeypatch, "docqa", "--seed", "4", "--output", str(path))
    told = capsys.readouterr()
    assert not told.out
    assert "160 requests" in told.err
    assert read_trace(path) == GENERATORS["docqa"](4)
    run(monkeypatch, "docqa", "--seed", "4")
    assert parse_trace(capsys.readouterr().out.splitlines(), "stdout") == read_trace(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["poetry"], "invalid choice"),
        (["chat", "--seed", "-1"], "--seed must be at least 0"),
        (["longctx", "--output", "missing/folder/trace.jsonl"], "cannot be written"),
    ],
)
def test_what_cannot_be_made_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
