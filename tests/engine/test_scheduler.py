"""The rules of scheduling, one by one, on plans made by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hkv_jax.engine.batch import build
from hkv_jax.engine.engine import Engine
from hkv_jax.engine.plan import StepPlan
from hkv_jax.engine.request import Request, SequenceState
from hkv_jax.engine.scheduler import SchedulerConfig
from hkv_jax.engine.step_result import StepResult
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.errors import RequestError
from hkv_jax.outputs import FinishReason
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.fake_engine import FakeEngineConfig, fake_engine, global_group

BASE = FakeEngineConfig()


def tight(num_blocks: int, max_model_len: int = 64) -> FakeEngineConfig:
    """A cache of ``num_blocks`` blocks of 8 tokens in a single global group."""
    block_bytes = 2 * 8 * 8 * 4
    return FakeEngineConfig(
        groups=(global_group(),), kv_cache_memory=num_blocks * block_bytes, max_model_len=max_model_len
    )


class Rig:
    """A scheduler whose plans are built as the engine builds them, and answered with tokens given by hand."""

    def __init__(self, config: FakeEngineConfig = BASE) -> None:
        self.engine: Engine = fake_engine(config)
        self.scheduler, self.cache = self.engine.scheduler, self.engine.cache

    def add(self, name: str, prompt_len: int, **params: object) -> None:
        self.scheduler.add(Request.create(name, [1] * prompt_len, SamplingParams(**params)))  # type: ignore[arg-type]

    def try_plan(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        if plan is not None:
            build(plan, self.cache, self.scheduler.lanes, self.engine.buckets.choose(plan))
        self.scheduler.check_invariants()
        return plan

    def plan(self) -> StepPlan:
        plan = self.try_plan()
        assert plan is not None
        return plan

    def commit(self, plan: StepPlan, token: int = 9) -> list[TokenEvent]:
        events = self.scheduler.commit(plan, StepResult(np.full(plan.num_rows, token, np.int32)))
        self.scheduler.check_invariants()
        return events

    def used_blocks(self) -> int:
        return sum(pool.used_blocks for pool in self.cache.stats())


def chunks_of(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(chunk.sequence.request.request_id, chunk.start, chunk.end, chunk.samples) for chunk in plan.chunks]


def decoding(plan: StepPlan) -> list[str]:
    return [sequence.request.request_id for sequence in plan.decode.sequences]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SchedulerConfig)])
def test_limits_below_one_are_refused(field: str) -> None:
    good = SchedulerConfig(4, 16, 16, 100, 50)
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(good, **{field: 0})


def test_a_budget_below_one_token_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens is 3"):
        SchedulerConfig(4, 3, 16, 100, 50)


def test_requests_that_can_never_be_served_are_refused() -> None:
    rig = Rig()
    rig.add("a", 127)
    with pytest.raises(RequestError, match="128 tokens; max_model_len 128 leaves room for at most 127"):
        rig.add("b", 128)
    with pytest.raises(RequestError, match="'a' is in use"):
        rig.add("a", 1)
    with pytest.raises(RequestError, match="0 to 96"):
        rig.scheduler.add(Request.create("c", [97], SamplingParams()))
    with pytest.raises(RequestError, match="stop_token_ids"):
        rig.add("d", 1, stop_token_ids=(97,))
    assert rig.scheduler.num_waiting == 1


def test_decodes_come_first_and_prefills_share_what_is_left() -> None:
    rig = Rig(dataclasses.replace(BASE, max_num_batched_tokens=16))
    rig.add("a", 5)
    rig.commit(rig.plan())
    rig.add("b", 10)
    rig.add("c", 20)
    plan = rig.plan()
    assert decoding(plan) == ["a"]
    assert chunks_of(plan) == [("b", 0, 10, True), ("c", 0, 5, False)]
    assert plan.num_tokens == 16
    assert [sequence.request.request_id for sequence in plan.admitted] == ["b", "c"]


def test_one_sequence_takes_at_most_a_chunk() -> None:
    rig = Rig(dataclasses.replace(BASE, max_prefill_chunk=8))
    rig.add("a", 20)
    rig.add("b", 3)
    assert sorted(chunks_of(rig.plan())) == [("a", 0, 8, False), ("b", 0, 3, True)]
    assert chunks_of(rig.plan()) == [("a", 8, 16, False)]
    assert chunks_of(rig.plan()) == [("a", 16, 20, True)]


def test_chunks_end_at_a_block_of_every_group_where_they_can() -> None:
    rig = Rig(dataclasses.replace(BASE, max_num_batched_tokens=21, max_num_seqs=2))
    rig.add("a", 60)
    assert chunks_of(rig.plan()) == [("a", 0, 16, False)]
    assert chunks_of(rig.plan()) == [("a", 16, 32, False)]


def test_a_chunk_too_small_to_reach_a_block_ends_where_the_budget_ends() -> None:
    rig = Rig(dataclasses.replace(BASE, max_prefill_chunk=5))
    rig.add("a", 14)
    spans = [chunks_of(rig.plan())[0][1:3] for _ in range(4)]
    assert spans == [(0, 5), (5, 8), (8, 13), (13, 14)]


def test_rows_of_one_token_come_before_longer_chunks() -> None:
    rig = Rig()
    rig.add("a", 9)
    rig.add("b", 1)
    assert chunks_of(rig.plan()) == [("b", 0, 1, True), ("a", 0, 9, True)]


def test_a_step_is_planned_before_the_tokens_of_the_last_are_read() -> None:
    rig = Rig()
    rig.add("a", 4)
    first, second = rig.plan(), rig.plan()
    assert second.decode.positions.tolist() == [4]
    assert [event.token_id for event in rig.commit(first, 7)] == [7]
    third = rig.plan()
    assert third.decode.positions.tolist() == [5]
    assert [event.token_id for event in rig.commit(second, 8)] == [8]


def test_length_is_known_beforehand_and_never_run_past() -> None:
    rig = Rig(dataclasses.replace(BASE, max_num_seqs=1))
    rig.add("a", 4, max_tokens=2)
    rig.add("b", 4, max_tokens=1)
    first, second = rig.plan(), rig.plan()
    assert decoding(second) == ["a"]
    rig.commit(first)
    # The lane is free although the last token of "a" has not been read.
    third = rig.plan()
    assert chunks_of(third) == [("b", 0, 4, True)]
    assert decoding(third) == []
    (last,) = rig.commit(second)
    assert last.finish_reason is FinishReason.LENGTH
    assert rig.try_plan() is None
    assert rig.commit(third)[0].finish_reason is FinishReason.LENGTH
    assert not rig.scheduler.has_work


def test_length_counts_the_prompt_up_to_max_model_len() -> None:
    rig = Rig()
    rig.add("a", 126, max_tokens=50)
    steps = []
    while (plan := rig.try_plan()) is not None:
        steps.append(rig.commit(plan))
    assert [event.finish_reason for events in steps for event in events] == [None, FinishReason.LENGTH]


def test_a_stop_id_is_seen_one_step_late_and_the_extra_token_dropped() -> None:
    rig = Rig()
    rig.add("a", 4, stop_token_ids=(5,))
    first = rig.plan()
    second = rig.plan()
    (event,) = rig.commit(first, 5)
    assert (event.finish_reason, event.stop_reason) == (FinishReason.STOP, 5)
    assert rig.used_blocks() == 0
    assert rig.commit(second, 6) == []
    assert event.sequence.output_token_ids == [5]
    assert not rig.scheduler.has_work


def test_a_stop_id_before_min_tokens_does_not_stop() -> None:
    rig = Rig()
    rig.add("a", 4, stop_token_ids=(5,), min_tokens=2)
    reasons = [rig.commit(rig.plan(), 5)[0].finish_reason for _ in range(3)]
    assert reasons == [None, None, FinishReason.STOP]


def test_no_more_sequences_run_than_there_are_lanes() -> None:
    rig = Rig(dataclasses.replace(BASE, max_num_seqs=2))
    for name in "abc":
        rig.add(name, 2)
    assert len(rig.plan().chunks) == 2
    assert (rig.scheduler.num_running, rig.scheduler.num_waiting) == (2, 1)
    assert rig.plan().chunks == ()


def test_nobody_passes_the_head_of_the_queue() -> None:
    rig = Rig(tight(num_blocks=8))
    rig.add("a", 30)
    rig.add("big", 40)
    rig.add("small", 2)
    assert [name for name, *_ in chunks_of(rig.plan())] == ["a"]
    assert rig.plan().chunks == ()
    assert rig.scheduler.num_waiting == 2


def test_a_preempted_sequence_waits_for_its_unread_token_and_computes_everything_again() -> None:
    rig = Rig(tight(num_blocks=4, max_model_len=32))
    rig.add("a", 15)
    rig.add("b", 15)
    first, second = rig.plan(), rig.plan()
    rig.commit(first, 3)
    third = rig.plan()  # both outgrow their two blocks: "a" takes those of "b"
    assert decoding(third) == ["a"]
    assert rig.scheduler.num_preemptions == 1
    (b,) = (sequence for sequence in second.decode.sequences if sequence.request.request_id == "b")
    assert b.in_flight == 1
    rig.scheduler.abort("a")
    assert rig.try_plan() is None, "its token is not read yet"
    assert [event.token_id for event in rig.commit(second, 4)] == [4]
    assert b.output_token_ids == [3, 4]
    assert rig.commit(third) == []
    again = rig.plan()
    assert chunks_of(again) == [("b", 0, 17, True)]
    assert [event.token_id for event in rig.commit(again, 5)] == [5]
    assert b.output_token_ids == [3, 4, 5]


def test_the_youngest_sits_out_rather_than_giving_way_to_itself() -> None:
    rig = Rig(tight(num_blocks=4, max_model_len=32))
    rig.add("a", 10)
    rig.add("b", 15)
    rig.commit(rig.plan())
    rig.scheduler.abort("a")
    rig.add("c", 16)
    plan = rig.plan()  # "b" is at 15; "c" takes the other two blocks
    assert decoding(plan) == ["b"]
    assert chunks_of(plan) == [("c", 0, 16, True)]
    rig.commit(plan)
    short = rig.plan()  # both need a block, none is free: the older takes, and "c" loses its own
    assert decoding(short) == ["b"]
    assert rig.scheduler.num_running == 1
    rig.scheduler.abort("b")
    rig.commit(short)
    assert chunks_of(rig.plan()) == [("c", 0, 17, True)]


def test_one_that_sits_out_keeps_what_it_holds_and_nobody_is_admitted() -> None:
    rig = Rig(tight(num_blocks=4, max_model_len=32))
    rig.add("a", 3)
    rig.add("b", 24)
    rig.commit(rig.plan())
    rig.add("c", 1)
    plan = rig.plan()  # "b" is full, "a" is not
    assert decoding(plan) == ["a"]
    assert plan.chunks == ()
    assert (rig.scheduler.num_running, rig.scheduler.num_waiting) == (2, 1)
    assert rig.scheduler.num_preemptions == 0
    rig.scheduler.abort("a")
    assert decoding(rig.plan()) == ["b"]


def test_a_prefill_takes_blocks_of_younger_decodes_already_in_the_plan() -> None:
    rig = Rig(dataclasses.replace(tight(num_blocks=8), max_prefill_chunk=8, max_num_batched_tokens=16))
    rig.add("old", 60)
    rig.commit(rig.plan())
    rig.add("young", 4)
    seen = []
    for _ in range(7):
        plan = rig.plan()
        seen.append((decoding(plan), [span[:3] for span in chunks_of(plan)]))
        rig.commit(plan)
    assert seen[0] == ([], [("old", 8, 16), ("young", 0, 4)])
    assert seen[4] == (["young"], [("old", 40, 48)])
    assert seen[5] == ([], [("old", 48, 56)]), "of eight blocks, the decode had just taken its second"
    assert seen[6] == ([], [("old", 56, 60)])


def test_abort_frees_everything_now_and_drops_what_comes_back() -> None:
    rig = Rig()
    rig.add("a", 20)
    rig.add("waits", 20, n=3)
    plan = rig.plan()
    rig.scheduler.abort("a")
    rig.scheduler.abort("waits")
    rig.scheduler.abort("never was")
    assert rig.used_blocks() == 0
    assert not rig.scheduler.has_work
    assert (rig.scheduler.num_running, rig.scheduler.num_waiting) == (0, 0)
    assert rig.commit(plan) == []


def test_a_lane_taken_over_while_its_old_result_is_unread_is_not_confused() -> None:
    rig = Rig(dataclasses.replace(BASE, max_num_seqs=1))
    rig.add("a", 4)
    rig.add("b", 4)
    old = rig.plan()
    rig.scheduler.abort("a")
    new = rig.plan()
    assert rig.commit(old) == []
    (event,) = rig.commit(new)
    assert event.sequence.request.request_id == "b"
    assert event.sequence.output_token_ids == [9]


def test_finish_ends_one_sample() -> None:
    rig = Rig()
    rig.add("a", 1, n=2)
    rig.commit(rig.plan())
    rig.scheduler.finish("a", 0)
    rig.scheduler.finish("a", 0)
    plan = rig.plan()
    assert [sequence.sample for sequence in plan.decode.sequences] == [1]
    rig.scheduler.finish("a", 1)
    assert not rig.scheduler.has_work


def test_samples_share_all_but_the_last_prompt_token() -> None:
    rig = Rig()
    rig.add("a", 20, n=3)
    assert rig.scheduler.num_waiting == 3
    first = rig.plan()
    assert chunks_of(first) == [("a", 0, 19, False)]
    assert rig.commit(first) == []
    second = rig.plan()
    assert chunks_of(second) == [("a", 19, 20, True)] * 3
    assert [chunk.sequence.sample for chunk in second.chunks] == [0, 1, 2]
    assert [(fork.source, fork.target, len(fork.copies)) for fork in second.forks] == [(0, 1, 2), (0, 2, 2)]
    assert second.admitted == ()
    assert len(rig.commit(second)) == 3
    assert rig.scheduler.num_waiting == 0


def test_a_whole_number_of_blocks_is_shared_without_a_copy() -> None:
    rig = Rig()
    rig.add("a", 17, n=2)
    rig.plan()
    (fork,) = rig.plan().forks
    assert fork.copies == ()


def test_samples_of_a_single_token_have_nothing_to_share() -> None:
    rig = Rig()
    rig.add("a", 1, n=3)
    plan = rig.plan()
    assert plan.forks == ()
    assert chunks_of(plan) == [("a", 0, 1, True)] * 3


def test_samples_without_a_lane_wait_and_compute_the_prompt_themselves() -> None:
    rig = Rig(dataclasses.replace(BASE, max_num_seqs=2))
    rig.add("a", 10, n=4, max_tokens=1)
    rig.plan()
    second = rig.plan()
    assert len(second.forks) == 1
    assert rig.scheduler.num_waiting == 2
    assert chunks_of(rig.plan()) == [("a", 0, 10, True)] * 2


def test_a_sample_that_comes_late_goes_before_those_that_overtook_it() -> None:
    rig = Rig(dataclasses.replace(BASE, max_num_seqs=2, max_num_batched_tokens=16, max_prefill_chunk=8))
    rig.add("a", 20, n=2)
    rig.add("b", 100)
    for _ in range(4):
        rig.plan()  # the last of these finds no lane for the second sample of "a"
    rig.scheduler.finish("a", 0)
    assert [name for name, *_ in chunks_of(rig.plan())] == ["b", "a"]
    assert [name for name, *_ in chunks_of(rig.plan())] == ["a", "b"]


def test_samples_without_a_block_for_the_copy_wait() -> None:
    rig = Rig(tight(num_blocks=8))
    rig.add("a", 60, n=2)
    while not (plan := rig.plan()).chunks[0].samples:
        pass
    assert plan.forks == ()
    assert len(plan.chunks) == 1
    assert (rig.scheduler.num_running, rig.scheduler.num_waiting) == (1, 1)


def test_reset_keeps_what_was_read_and_runs_everything_again() -> None:
    rig = Rig()
    rig.add("a", 4, max_tokens=3)
    rig.add("b", 4, max_tokens=2)
    first, _ = rig.plan(), rig.plan()
    rig.commit(first, 7)
    rig.plan()
    rig.scheduler.reset()
    rig.scheduler.check_invariants()
    assert rig.used_blocks() == 0
    assert (rig.scheduler.num_running, rig.scheduler.num_waiting) == (0, 2)
    assert chunks_of(rig.plan()) == [("a", 0, 5, True), ("b", 0, 5, True)]
