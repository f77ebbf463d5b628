"""Who has arrived, turns of a conversation included."""

from __future__ import annotations

from tools.cache_simulation.arrivals import Arrivals
from tools.cache_simulation.trace import TraceRequest


def request(name: str, arrival: float, after: str | None = None, think: float = 0.0) -> TraceRequest:
    return TraceRequest(name, arrival, after, think, (("words", 3),), 1)


def names(requests: list[TraceRequest]) -> list[str]:
    return [one.request_id for one in requests]


def test_requests_come_in_order_of_arrival_and_then_of_the_trace() -> None:
    arrivals = Arrivals([request("late", 2.0), request("first", 1.0), request("second", 1.0)])
    assert arrivals.next_arrival == 1.0
    assert names(arrivals.take(0.5)) == []
    assert names(arrivals.take(2.0)) == ["first", "second", "late"]
    assert arrivals.next_arrival is None


def test_a_turn_comes_when_the_one_before_has_ended_and_its_user_has_thought() -> None:
    arrivals = Arrivals([request("a", 0.0), request("b", 0.0, "a", 3.0), request("c", 9.0, "a", 3.0)])
    assert names(arrivals.take(100.0)) == ["a"]
    arrivals.finish("a", 4.0)
    assert arrivals.next_arrival == 7.0
    assert names(arrivals.take(7.0)) == ["b"]
    assert names(arrivals.take(8.9)) == []
    assert names(arrivals.take(9.0)) == ["c"]
