"""A trace of requests: one JSON object a line, read strictly.

Owns: the format and the words of every refusal, with the line it is about. Must never: make token ids, or replay.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

OUTPUT_PREFIX = "out:"
"""A segment of this name and a request's id is that request's output."""

FIELDS = ("id", "arrival", "after", "think", "segments", "prompt_len", "output_len")
OPTIONAL = ("after", "think")
MAX_TOKENS = 2**31 - 1


class TraceError(Exception):
    """A trace is not what ``tools/simulate_cache.py`` reads; the message names file and line."""


@dataclasses.dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request.

    Attributes:
        request_id: unique in the trace.
        arrival: seconds; with ``after`` the earliest moment.
        after: the request it follows, ``think`` seconds after that one's end; or ``None``.
        segments: (segment id, tokens): the prompt is the first tokens of each, one after the other.
        output_len: tokens of its forced output, at least 1.
    """

    request_id: str
    arrival: float
    after: str | None
    think: float
    segments: tuple[tuple[str, int], ...]
    output_len: int

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt, at least 1."""
        return sum(length for _, length in self.segments)

    def to_json(self) -> str:
        """Its line of a trace file, without the line's end."""
        values = (
            *(self.request_id, self.arrival, self.after, self.think),
            *([list(segment) for segment in self.segments], self.prompt_len, self.output_len),
        )
        return json.dumps(dict(zip(FIELDS, values, strict=True)), separators=(",", ":"))


def read_trace(path: Path) -> list[TraceRequest]:
    """The requests of a file, in its order.

    Raises:
        TraceError: it cannot be read, or is no trace.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read ({error})") from error
    return parse_trace(text.splitlines(), str(path))


def parse_trace(lines: Iterable[str], where: str) -> list[TraceRequest]:
    """The requests of the lines of a file called ``where``; empty lines are passed over.

    Raises:
        TraceError: a line is no request, an id is there twice, or ``after`` leads nowhere or in a circle.
    """
    requests: list[TraceRequest] = []
    line_of: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        here = f"{where}:{number}"
        request = _parse_line(line, here)
        if request.request_id in line_of:
            first = line_of[request.request_id].rpartition(":")[2]
            raise TraceError(f"{here}: id {request.request_id!r} was taken in line {first}; ids are unique")
        line_of[request.request_id] = here
        requests.append(request)
    if not requests:
        raise TraceError(f"{where}: holds no request; a trace has one JSON object a line")
    _check_links(requests, line_of)
    return requests


def _parse_line(line: str, here: str) -> TraceRequest:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{here}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise TraceError(f"{here}: must be one JSON object, is a {type(values).__name__}")
    missing = [name for name in FIELDS if name not in values and name not in OPTIONAL]
    unknown = [name for name in values if name not in FIELDS]
    if missing or unknown:
        raise TraceError(
            f"{here}: {'lacks' if missing else 'has an unknown'} field {(missing or unknown)[0]!r}; "
            f"fields are {', '.join(FIELDS)}"
        )
    after, think = values.get("after"), values.get("think")
    request = TraceRequest(
        request_id=_text(values, "id", here),
        arrival=_seconds(values, "arrival", here),
        after=None if after is None else _text(values, "after", here),
        think=0.0 if think is None else _seconds(values, "think", here),
        segments=_segments(values["segments"], here),
        output_len=_count(values["output_len"], "output_len", here),
    )
    if _count(values["prompt_len"], "prompt_len", here) != request.prompt_len:
        raise TraceError(f"{here}: prompt_len is {values['prompt_len']}, but its segments have {request.prompt_len}")
    return request


def _text(values: Mapping[str, object], name: str, here: str) -> str:
    value = values[name]
    if not isinstance(value, str) or not value:
        raise TraceError(f"{here}: {name} is {value!r}; accepted: a string that is not empty")
    return value


def _seconds(values: Mapping[str, object], name: str, here: str) -> float:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise TraceError(f"{here}: {name} is {value!r}; accepted: seconds, at least 0")
    return float(value)


def _count(value: object, name: str, here: str, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_TOKENS:
        raise TraceError(f"{here}: {name} is {value!r}; accepted: an integer from {least} to {MAX_TOKENS}")
    return value


def _segments(value: object, here: str) -> tuple[tuple[str, int], ...]:
    if not isinstance(value, list) or not value:
        raise TraceError(f"{here}: segments is {value!r}; accepted: a list of [segment id, tokens]")
    segments = []
    for one in value:
        if not isinstance(one, list) or len(one) != 2 or not isinstance(one[0], str):
            raise TraceError(f"{here}: segments holds {one!r}; accepted: [segment id, tokens]")
        segments.append((one[0], _count(one[1], f"the length of segment {one[0]!r}", here, least=0)))
    return tuple(segments)


def _check_links(requests: Sequence[TraceRequest], line_of: Mapping[str, str]) -> None:
    by_id = {request.request_id: request for request in requests}
    ends: set[str] = set()  # requests from which ``after`` is known to lead to one that follows nobody
    for request in requests:
        here = line_of[request.request_id]
        for name, length in request.segments:
            source = by_id.get(name.removeprefix(OUTPUT_PREFIX)) if name.startswith(OUTPUT_PREFIX) else None
            if source is not None and length > source.output_len:
                raise TraceError(f"{here}: segment {name!r} has {length} tokens, but that output {source.output_len}")
        walked: list[str] = []
        current = request
        while current.after is not None and current.request_id not in ends:
            if current.request_id in walked:
                raise TraceError(f"{here}: after leads in a circle through {current.request_id!r}; it would never run")
            walked.append(current.request_id)
            if current.after not in by_id:
                raise TraceError(
                    f"{line_of[current.request_id]}: after is {current.after!r}, which no line has as its id"
                )
            current = by_id[current.after]
        ends.update(walked)
