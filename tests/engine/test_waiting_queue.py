"""The queue is in order of age, whoever comes back."""

from __future__ import annotations

import pytest

from hkv_jax.engine.request import Request, Sequence
from hkv_jax.engine.waiting_queue import WaitingQueue
from hkv_jax.sampling_params import SamplingParams


def sequence(arrival: int, sample: int = 0) -> Sequence:
    return Sequence.create(Request.create(f"{arrival}", [1], SamplingParams(n=8)), sample, arrival, 10)


def test_everyone_finds_their_place() -> None:
    queue = WaitingQueue()
    heads = [queue.head]
    for arrival, sample in ((5, 0), (6, 0), (7, 0), (3, 0), (1, 0), (5, 2), (3, 1)):
        queue.insert(sequence(arrival, sample))
    assert [each.age for each in queue] == [(1, 0), (3, 0), (3, 1), (5, 0), (5, 2), (6, 0), (7, 0)]
    heads.append(queue.head)
    assert [head and head.age for head in heads] == [None, (1, 0)]
    assert len(queue) == 7


def test_one_is_taken_out_of_the_middle() -> None:
    queue = WaitingQueue()
    members = [sequence(arrival) for arrival in range(3)]
    for member in members:
        queue.insert(member)
    queue.remove(members[1])
    assert list(queue) == [members[0], members[2]]
    assert [member in queue for member in members] == [True, False, True]
    with pytest.raises(ValueError, match="does not wait here"):
        queue.remove(members[1])


def test_another_of_the_same_age_is_not_the_one() -> None:
    queue = WaitingQueue()
    queue.insert(sequence(1))
    other = sequence(1)
    assert other not in queue
    with pytest.raises(ValueError, match="does not wait here"):
        queue.remove(other)
    assert len(queue) == 1
