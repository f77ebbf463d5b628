"""The queue is in order of age, whoever comes back."""

from __future__ import annotations

import pytest

from hkv_jax.engine.request import Request, Sequence
from hkv_jax.engine.waiting_queue import WaitingQueue
from hkv_jax.sampling_params import SamplingParams


def sequence(arrival: int, sample: int = 0) -> Sequence:
    return Sequence.create(Request.create(f"{arrival}", [1], SamplingParams(n=8)), sample, arrival, 10)


def test_those_that_come_back_find_their_place() -> None:
    queue = WaitingQueue()
    for arrival in (5, 6, 7):
        queue.append(sequence(arrival))
    for arrival, sample in ((3, 0), (1, 0), (5, 2), (3, 1)):
        queue.insert(sequence(arrival, sample))
    assert [each.age for each in queue] == [(1, 0), (3, 0), (3, 1), (5, 0), (5, 2), (6, 0), (7, 0)]
    assert queue.head.age == (1, 0)
    assert queue.pop().age == (1, 0)
    assert len(queue) == 6


def test_a_new_one_is_the_youngest() -> None:
    queue = WaitingQueue()
    queue.append(sequence(2))
    with pytest.raises(AssertionError):
        queue.append(sequence(1))


def test_one_is_taken_out_of_the_middle() -> None:
    queue = WaitingQueue()
    members = [sequence(arrival) for arrival in range(3)]
    for member in members:
        queue.append(member)
    queue.remove(members[1])
    assert list(queue) == [members[0], members[2]]
    with pytest.raises(ValueError, match="not in"):
        queue.remove(members[1])
