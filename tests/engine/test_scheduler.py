"""The rules of scheduling, one by one, on plans made by hand."""

from __future__ import annotations

import dataclasses

import pytest

from hkv_jax.engine.request import Request
from hkv_jax.engine.scheduler_config import SchedulerConfig
from hkv_jax.errors import RequestError
from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.outputs import FinishReason
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.fake_engine import FakeEngineConfig, tight_config
from hkv_jax.testing.hand_driven import HandDriven, chunks_of, decoding

BASE = FakeEngineConfig()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SchedulerConfig)])
def test_limits_below_the_least_are_refused(field: str) -> None:
    good = SchedulerConfig(4, 16, 16, 100, 50)
    least = 0 if field.endswith("_seconds") else 1
    with pytest.raises(ValueError, match=f"{field} is {least - 1}; it must be at least {least}"):
        dataclasses.replace(good, **{field: least - 1})
    if not least:
        dataclasses.replace(good, **{field: 0})


def test_a_budget_below_one_token_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens is 3"):
        SchedulerConfig(4, 3, 16, 100, 50)


def test_requests_that_can_never_be_served_are_refused() -> None:
    driven = HandDriven()
    driven.add("a", 127)
    with pytest.raises(RequestError, match="128 tokens; max_model_len 128 leaves room for at most 127"):
        driven.add("b", 128)
    with pytest.raises(RequestError, match="'a' is in use"):
        driven.add("a", 1)
    with pytest.raises(RequestError, match="0 to 96"):
        driven.scheduler.add(Request.create("c", [97], SamplingParams()))
    with pytest.raises(RequestError, match="stop_token_ids"):
        driven.add("d", 1, stop_token_ids=(97,))
    assert driven.scheduler.num_waiting == 1


def test_decodes_come_first_and_prefills_share_what_is_left() -> None:
    driven = HandDriven(dataclasses.replace(BASE, max_num_batched_tokens=16))
    driven.add("a", 5)
    driven.commit(driven.plan())
    driven.add("b", 10)
    driven.add("c", 20)
    plan = driven.plan()
    assert decoding(plan) == ["a"]
    assert chunks_of(plan) == [("b", 0, 10, True), ("c", 0, 5, False)]
    assert plan.num_tokens == 16
    assert [sequence.request.request_id for sequence in plan.admitted] == ["b", "c"]


def test_one_sequence_takes_at_most_a_chunk() -> None:
    driven = HandDriven(dataclasses.replace(BASE, max_prefill_chunk=8))
    driven.add("a", 20)
    driven.add("b", 3)
    assert sorted(chunks_of(driven.plan())) == [("a", 0, 8, False), ("b", 0, 3, True)]
    assert chunks_of(driven.plan()) == [("a", 8, 16, False)]
    assert chunks_of(driven.plan()) == [("a", 16, 20, True)]


def test_chunks_end_at_a_block_of_every_group_where_they_can() -> None:
    driven = HandDriven(dataclasses.replace(BASE, max_num_batched_tokens=21, max_num_seqs=2))
    driven.add("a", 60)
    assert chunks_of(driven.plan()) == [("a", 0, 16, False)]
    assert chunks_of(driven.plan()) == [("a", 16, 32, False)]


def test_a_chunk_too_small_to_reach_a_block_ends_where_the_budget_ends() -> None:
    driven = HandDriven(dataclasses.replace(BASE, max_prefill_chunk=5))
    driven.add("a", 14)
    spans = [chunks_of(driven.plan())[0][1:3] for _ in range(4)]
    assert spans == [(0, 5), (5, 8), (8, 13), (13, 14)]


def test_rows_of_one_token_come_before_longer_chunks() -> None:
    driven = HandDriven()
    driven.add("a", 9)
    driven.add("b", 1)
    assert chunks_of(driven.plan()) == [("b", 0, 1, True), ("a", 0, 9, True)]


def test_a_step_is_planned_before_the_tokens_of_the_last_are_read() -> None:
    driven = HandDriven()
    driven.add("a", 4)
    first, second = driven.plan(), driven.plan()
    assert second.decode.positions.tolist() == [4]
    assert [event.token_id for event in driven.commit(first, 7)] == [7]
    third = driven.plan()
    assert third.decode.positions.tolist() == [5]
    assert [event.token_id for event in driven.commit(second, 8)] == [8]


def test_length_is_known_beforehand_and_never_run_past() -> None:
    driven = HandDriven(dataclasses.replace(BASE, max_num_seqs=1))
    driven.add("a", 4, max_tokens=2)
    driven.add("b", 4, max_tokens=1)
    first, second = driven.plan(), driven.plan()
    assert decoding(second) == ["a"]
    driven.commit(first)
    # The lane is free although the last token of "a" has not been read.
    third = driven.plan()
    assert chunks_of(third) == [("b", 0, 4, True)]
    assert decoding(third) == []
    (last,) = driven.commit(second)
    assert last.finish_reason is FinishReason.LENGTH
    assert driven.try_plan() is None
    assert driven.commit(third)[0].finish_reason is FinishReason.LENGTH
    assert not driven.scheduler.has_work


def test_length_counts_the_prompt_up_to_max_model_len() -> None:
    driven = HandDriven()
    driven.add("a", 126, max_tokens=50)
    steps = []
    while (plan := driven.try_plan()) is not None:
        steps.append(driven.commit(plan))
    assert [event.finish_reason for events in steps for event in events] == [None, FinishReason.LENGTH]


def test_a_stop_id_is_seen_one_step_late_and_the_extra_token_dropped() -> None:
    driven = HandDriven()
    driven.add("a", 4, stop_token_ids=(5,))
    first = driven.plan()
    second = driven.plan()
    (event,) = driven.commit(first, 5)
    assert (event.finish_reason, event.stop_reason) == (FinishReason.STOP, 5)
    assert driven.used_blocks() == 0
    assert driven.commit(second, 6) == []
    assert event.sequence.output_token_ids == [5]
    assert not driven.scheduler.has_work


def test_a_stop_id_before_min_tokens_does_not_stop() -> None:
    driven = HandDriven()
    driven.add("a", 4, stop_token_ids=(5,), min_tokens=2)
    reasons = [driven.commit(driven.plan(), 5)[0].finish_reason for _ in range(3)]
    assert reasons == [None, None, FinishReason.STOP]


def test_no_more_sequences_run_than_there_are_lanes() -> None:
    driven = HandDriven(dataclasses.replace(BASE, max_num_seqs=2))
    for name in "abc":
        driven.add(name, 2)
    assert len(driven.plan().chunks) == 2
    assert (driven.scheduler.num_running, driven.scheduler.num_waiting) == (2, 1)
    assert driven.plan().chunks == ()


def test_nobody_passes_the_head_of_the_queue() -> None:
    driven = HandDriven(tight_config(8, 64))
    driven.add("a", 30)
    driven.add("big", 40)
    driven.add("small", 2)
    assert [name for name, *_ in chunks_of(driven.plan())] == ["a"]
    assert driven.plan().chunks == ()
    assert driven.scheduler.num_waiting == 2


@pytest.mark.usefixtures("short_sighted")
@pytest.mark.parametrize(("enabled", "begins"), [(True, 8), (False, 0)])
def test_a_preempted_sequence_waits_for_its_unread_token_and_computes_what_it_lost(enabled: bool, begins: int) -> None:
    driven = HandDriven(tight_config(4, 32), CachePolicy(enabled=enabled))
    driven.add("a", 15)
    driven.add("b", 15)
    first, second = driven.plan(), driven.plan()
    driven.commit(first, 3)
    third = driven.plan()  # both outgrow their two blocks: "a" takes those of "b"
    assert decoding(third) == ["a"]
    assert driven.scheduler.num_preemptions == 1
    (b,) = (sequence for sequence in second.decode.sequences if sequence.request.request_id == "b")
    assert b.in_flight == 1
    driven.scheduler.abort("a")
    assert driven.try_plan() is None, "its token is not read yet"
    assert [event.token_id for event in driven.commit(second, 4)] == [4]
    assert b.output_token_ids == [3, 4]
    assert driven.commit(third) == []
    again = driven.plan()
    # Of the 16 tokens it had computed, "a" has taken the second block.
    assert chunks_of(again) == [("b", begins, 17, True)]
    assert [event.token_id for event in driven.commit(again, 5)] == [5]
    assert b.output_token_ids == [3, 4, 5]


@pytest.mark.usefixtures("short_sighted")
def test_the_youngest_sits_out_rather_than_giving_way_to_itself() -> None:
    driven = HandDriven(tight_config(4, 32))
    driven.add("a", 10)
    driven.add("b", 15)
    driven.commit(driven.plan())
    driven.scheduler.abort("a")
    driven.add("c", 16)
    plan = driven.plan()  # "b" is at 15; "c" takes the other two blocks
    assert decoding(plan) == ["b"]
    assert chunks_of(plan) == [("c", 0, 16, True)]
    driven.commit(plan)
    short = driven.plan()  # both need a block, none is free: the older takes, and "c" loses its own
    assert decoding(short) == ["b"]
    assert driven.scheduler.num_running == 1
    driven.scheduler.abort("b")
    driven.commit(short)
    # It finds the first of the two blocks it had; "b" took the other.
    assert chunks_of(driven.plan()) == [("c", 8, 17, True)]


@pytest.mark.usefixtures("short_sighted")
def test_one_that_sits_out_keeps_what_it_holds_and_nobody_is_admitted() -> None:
    driven = HandDriven(tight_config(4, 32))
    driven.add("a", 3)
    driven.add("b", 24)
    driven.commit(driven.plan())
    driven.add("c", 1)
    plan = driven.plan()  # "b" is full, "a" is not
    assert decoding(plan) == ["a"]
    assert plan.chunks == ()
    assert (driven.scheduler.num_running, driven.scheduler.num_waiting) == (2, 1)
    assert driven.scheduler.num_preemptions == 0
    driven.scheduler.abort("a")
    assert decoding(driven.plan()) == ["b"]


@pytest.mark.usefixtures("short_sighted")
def test_a_prefill_takes_blocks_of_younger_decodes_already_in_the_plan() -> None:
    driven = HandDriven(dataclasses.replace(tight_config(6, 48), max_prefill_chunk=4, max_num_batched_tokens=16))
    driven.add("old", 40)
    driven.commit(driven.plan())
    driven.add("young", 4)
    seen = []
    for _ in range(9):
        plan = driven.plan()
        seen.append((decoding(plan), [span[:3] for span in chunks_of(plan)]))
        driven.commit(plan)
    assert seen[0] == ([], [("old", 4, 8), ("young", 0, 4)])
    assert seen[6] == (["young"], [("old", 28, 32)])
    assert seen[7] == ([], [("old", 32, 36)]), "of six blocks, the decode had taken its second two steps before"
    assert seen[8] == ([], [("old", 36, 40)])


def test_abort_frees_everything_now_and_drops_what_comes_back() -> None:
    driven = HandDriven()
    driven.add("a", 20)
    driven.add("waits", 20, n=3)
    plan = driven.plan()
    driven.scheduler.abort("a")
    driven.scheduler.abort("waits")
    driven.scheduler.abort("never was")
    assert driven.used_blocks() == 0
    assert not driven.scheduler.has_work
    assert (driven.scheduler.num_running, driven.scheduler.num_waiting) == (0, 0)
    assert driven.commit(plan) == []


def test_a_lane_taken_over_while_its_old_result_is_unread_is_not_confused() -> None:
    driven = HandDriven(dataclasses.replace(BASE, max_num_seqs=1))
    driven.add("a", 4)
    driven.add("b", 4)
    old = driven.plan()
    driven.scheduler.abort("a")
    new = driven.plan()
    assert driven.commit(old) == []
    (event,) = driven.commit(new)
    assert event.sequence.request.request_id == "b"
    assert event.sequence.output_token_ids == [9]


def test_finish_ends_one_sample() -> None:
    driven = HandDriven()
    driven.add("a", 1, n=2)
    driven.commit(driven.plan())
    driven.scheduler.finish("a", 0)
    driven.scheduler.finish("a", 0)
    plan = driven.plan()
    assert [sequence.sample for sequence in plan.decode.sequences] == [1]
    driven.scheduler.finish("a", 1)
    assert not driven.scheduler.has_work


def test_reset_keeps_what_was_read_and_runs_everything_again() -> None:
    driven = HandDriven()
    driven.add("a", 4, max_tokens=3)
    driven.add("b", 4, max_tokens=2)
    first, _ = driven.plan(), driven.plan()
    driven.commit(first, 7)
    driven.plan()
    driven.scheduler.reset()
    driven.scheduler.check_invariants()
    assert driven.used_blocks() == 0
    assert (driven.scheduler.num_running, driven.scheduler.num_waiting) == (0, 2)
    assert chunks_of(driven.plan()) == [("a", 0, 5, True), ("b", 0, 5, True)]
