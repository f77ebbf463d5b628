"""Traces are read strictly, and every refusal says which line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.cache_simulation.trace import TraceError, TraceRequest, parse_trace, read_trace


def line(**changes: Any) -> str:
    fields = {
        "id": "a",
        "arrival": 0.5,
        "after": None,
        "think": 0.0,
        "segments": [["system", 3], ["question", 2]],
        "prompt_len": 5,
        "output_len": 4,
    }
    fields.update(changes)
    return json.dumps({name: value for name, value in fields.items() if value is not Ellipsis})


def test_a_request_is_what_its_line_says() -> None:
    (request,) = parse_trace([line()], "t")
    assert request == TraceRequest("a", 0.5, None, 0.0, (("system", 3), ("question", 2)), 4)
    assert request.prompt_len == 5


def test_what_is_written_is_read_again() -> None:
    first = TraceRequest("a", 0.0, None, 0.0, (("system", 3),), 4)
    second = TraceRequest("b", 1.25, "a", 2.5, (("system", 3), ("out:a", 4), ("more", 1)), 9)
    assert parse_trace([first.to_json(), second.to_json()], "t") == [first, second]


def test_a_request_may_follow_nobody_and_have_empty_segments() -> None:
    (request,) = parse_trace([line(after=..., think=None, segments=[["a", 5], ["b", 0]])], "t")
    assert (request.after, request.think, request.prompt_len) == (None, 0.0, 5)


def test_empty_lines_are_passed_over_and_counted() -> None:
    with pytest.raises(TraceError, match=r"^t:3: "):
        parse_trace([line(), "", "{"], "t")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "t:1: must be one JSON object, is a list"),
        ("nonsense", "t:1: not valid JSON"),
        (line(arrival=...), "t:1: lacks field 'arrival'"),
        (line(priority=1), "t:1: has an unknown field 'priority'"),
        (line(id=""), "t:1: id is ''"),
        (line(id=7), "t:1: id is 7"),
        (line(arrival=-1), "t:1: arrival is -1"),
        (line(arrival=True), "t:1: arrival is True"),
        (line(think="soon"), "t:1: think is 'soon'"),
        (line(output_len=0), "t:1: output_len is 0"),
        (line(segments=[]), "t:1: segments is []"),
        (line(segments=[["a"]]), "t:1: segments holds ['a']"),
        (line(segments=[["a", -1]]), "t:1: the length of segment 'a' is -1"),
        (line(segments=[["a", 0]], prompt_len=0), "t:1: prompt_len is 0"),
        (line(prompt_len=6), "t:1: prompt_len is 6, but its segments have 5"),
        (line(after="b"), "t:1: after is 'b', which no line has as its id"),
    ],
)
def test_a_bad_line_is_refused(text: str, message: str) -> None:
    with pytest.raises(TraceError) as caught:
        parse_trace([text], "t")
    assert message in str(caught.value)


def test_ids_are_unique() -> None:
    with pytest.raises(TraceError, match=r"^t:2: id 'a' was taken in line 1"):
        parse_trace([line(), line()], "t")


def test_an_output_is_not_longer_than_it_was() -> None:
    turn = line(id="b", after="a", segments=[["out:a", 5]], prompt_len=5)
    with pytest.raises(TraceError, match=r"^t:2: segment 'out:a' has 5 tokens, but that output 4"):
        parse_trace([line(), turn], "t")


def test_turns_may_come_in_any_order_but_not_in_a_circle() -> None:
    assert len(parse_trace([line(id="c", after="b"), line(id="b", after="a"), line()], "t")) == 3
    with pytest.raises(TraceError, match="in a circle"):
        parse_trace([line(id="b", after="c"), line(), line(id="c", after="b")], "t")


def test_a_trace_without_requests_or_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="holds no request"):
        parse_trace(["", " "], "t")
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "missing.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "binary.jsonl")


def test_the_traces_of_the_repository_are_read() -> None:
    folder = Path(__file__).resolve().parents[3] / "benchmarks" / "traces"
    counts = {path.stem: len(read_trace(path)) for path in sorted(folder.glob("*.jsonl"))}
    assert counts == {"chat": 892, "docqa": 160, "longctx": 48, "mixed": 600, "sharegpt": 1000}
