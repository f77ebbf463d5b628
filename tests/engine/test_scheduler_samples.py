"""How the samples of one prompt share it."""

from __future__ import annotations

import dataclasses

import pytest

from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.testing.fake_engine import FakeEngineConfig, tight_config
from hkv_jax.testing.hand_driven import HandDriven, chunks_of

BASE = FakeEngineConfig()


def test_samples_share_all_but_the_last_prompt_token() -> None:
    driven = HandDriven()
    driven.add("a", 20, n=3)
    assert driven.scheduler.num_waiting == 3
    first = driven.plan()
    assert chunks_of(first) == [("a", 0, 19, False)]
    assert driven.commit(first) == []
    second = driven.plan()
    assert chunks_of(second) == [("a", 19, 20, True)] * 3
    assert [chunk.sequence.sample for chunk in second.chunks] == [0, 1, 2]
    assert [(fork.source, fork.target, len(fork.copies)) for fork in second.forks] == [(0, 1, 2), (0, 2, 2)]
    assert second.admitted == ()
    assert len(driven.commit(second)) == 3
    assert driven.scheduler.num_waiting == 0


def test_a_whole_number_of_blocks_is_shared_without_a_copy() -> None:
    driven = HandDriven()
    driven.add("a", 17, n=2)
    driven.plan()
    (fork,) = driven.plan().forks
    assert fork.copies == ()


def test_samples_of_a_single_token_have_nothing_to_share() -> None:
    driven = HandDriven()
    driven.add("a", 1, n=3)
    plan = driven.plan()
    assert plan.forks == ()
    assert chunks_of(plan) == [("a", 0, 1, True)] * 3


@pytest.mark.parametrize(("enabled", "begins"), [(True, 8), (False, 0)])
def test_samples_without_a_lane_wait_and_compute_what_is_not_cached_themselves(enabled: bool, begins: int) -> None:
    driven = HandDriven(dataclasses.replace(BASE, max_num_seqs=2), CachePolicy(enabled=enabled))
    driven.add("a", 10, n=4, max_tokens=1)
    driven.plan()
    second = driven.plan()
    assert len(second.forks) == 1
    assert driven.scheduler.num_waiting == 2
    assert chunks_of(driven.plan()) == [("a", begins, 10, True)] * 2


def test_a_sample_that_comes_late_goes_before_those_that_overtook_it() -> None:
    config = dataclasses.replace(BASE, max_num_seqs=2, max_num_batched_tokens=16, max_prefill_chunk=8)
    driven = HandDriven(config, CachePolicy(enabled=False))  # else it would have nothing to compute but its last token
    driven.add("a", 20, n=2)
    driven.add("b", 100)
    for _ in range(4):
        driven.plan()  # the last of these finds no lane for the second sample of "a"
    driven.scheduler.finish("a", 0)
    assert [name for name, *_ in chunks_of(driven.plan())] == ["b", "a"]
    assert [name for name, *_ in chunks_of(driven.plan())] == ["a", "b"]


def test_samples_without_a_block_for_the_copy_wait() -> None:
    driven = HandDriven(tight_config(8, 64))
    driven.add("a", 60, n=2)
    while not (plan := driven.plan()).chunks[0].samples:
        pass
    assert plan.forks == ()
    assert len(plan.chunks) == 1
    assert (driven.scheduler.num_running, driven.scheduler.num_waiting) == (1, 1)
