"""The engine's loop: one step ahead, and what happens when a step fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hkv_jax.engine.batch import StepBatch
from hkv_jax.engine.engine import MAX_ATTEMPTS, Engine, StepFailedError
from hkv_jax.engine.plan import StepPlan
from hkv_jax.engine.request import Request
from hkv_jax.engine.step_result import StepResult
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.fake_engine import FakeEngineConfig, fake_engine, run_to_end
from hkv_jax.testing.fake_runner import FakeHandle, FakeRunner

CONFIG = FakeEngineConfig()

Tokens = dict[tuple[str, int], list[int]]


class BrokenHandle(FakeHandle):
    """A step that went wrong on the device."""

    def read(self) -> StepResult:
        raise RuntimeError("the device says no")


class FlakyRunner(FakeRunner):
    """Fails the steps that ``fails(number, plan)`` names: ``"dispatch"`` at once, ``"read"`` when read, or ``None``."""

    def __init__(self, engine: Engine, fails: Callable[[int, StepPlan], str | None]) -> None:
        self._fails = fails
        self.num_dispatched = self.num_resets = 0
        super().__init__(engine.cache.layout, engine.buckets, CONFIG.max_num_seqs, CONFIG.vocab_size)

    def reset(self) -> None:
        super().reset()
        self.num_resets += 1
        self._lost = False

    def dispatch(self, plan: StepPlan, batch: StepBatch) -> FakeHandle:
        assert not self._lost, "a failed step has lost every array"
        self.num_dispatched += 1
        failure = self._fails(self.num_dispatched, plan)
        if failure == "dispatch":
            self._lost = True
            raise RuntimeError("the device is gone")
        handle = super().dispatch(plan, batch)
        return BrokenHandle(handle.read()) if failure == "read" else handle


def engine_of(fails: Callable[[int, StepPlan], str | None]) -> tuple[Engine, FlakyRunner]:
    engine = fake_engine(CONFIG)
    runner = FlakyRunner(engine, fails)
    return Engine(engine.scheduler, engine.cache, runner), runner


def requests() -> list[Request]:
    params = [
        SamplingParams(seed=1, max_tokens=9),
        SamplingParams(seed=2, max_tokens=3, n=3),
        SamplingParams(seed=3, max_tokens=12, prompt_logprobs=1),
    ]
    return [Request.create(f"r{i}", range(1, 20 + 9 * i), each) for i, each in enumerate(params)]


def tokens_of(engine: Engine) -> Tokens:
    return {key: [event.token_id for event in events] for key, events in run_to_end(engine).items()}


def expected_tokens() -> Tokens:
    engine = fake_engine(CONFIG)
    for request in requests():
        engine.add(request)
    return tokens_of(engine)


def test_step_n_is_read_after_step_n_plus_one_is_dispatched() -> None:
    log: list[str] = []

    class LoggingHandle(FakeHandle):
        def read(self) -> StepResult:
            log.append("read")
            return super().read()

    class LoggingRunner(FakeRunner):
        def dispatch(self, plan: StepPlan, batch: StepBatch) -> FakeHandle:
            log.append("dispatch")
            return LoggingHandle(super().dispatch(plan, batch).read())

    plain = fake_engine(CONFIG)
    runner = LoggingRunner(plain.cache.layout, plain.buckets, CONFIG.max_num_seqs, CONFIG.vocab_size)
    engine = Engine(plain.scheduler, plain.cache, runner)
    engine.add(Request.create("a", [1, 2], SamplingParams(max_tokens=3, seed=0)))
    counts = []
    while engine.has_work:
        counts.append(len(engine.step()))
    assert log == ["dispatch", "dispatch", "read", "dispatch", "read", "read"]
    assert counts == [0, 1, 1, 1]


def test_an_idle_engine_does_nothing() -> None:
    engine = fake_engine(CONFIG)
    assert not engine.has_work
    assert engine.step() == []


def test_everybody_leaving_ends_the_work() -> None:
    engine = fake_engine(CONFIG)
    engine.add(Request.create("a", [1, 2], SamplingParams()))
    engine.step()
    engine.abort("a")
    assert engine.has_work, "a step is in flight"
    assert engine.step() == []
    assert not engine.has_work


def test_a_text_stop_ends_the_sample() -> None:
    engine = fake_engine(CONFIG)
    engine.add(Request.create("a", [1, 2], SamplingParams(seed=5)))
    engine.step()
    (event,) = engine.step()
    engine.finish("a", 0)
    assert engine.step() == []
    assert event.sequence.output_token_ids == [event.token_id]
    assert not engine.has_work


@pytest.mark.parametrize("where", ["dispatch", "read"])
@pytest.mark.parametrize("failing", [1, 2, 4, 7])
def test_a_failed_step_changes_no_token(where: str, failing: int, caplog: pytest.LogCaptureFixture) -> None:
    engine, runner = engine_of(lambda number, _: where if number == failing else None)
    for request in requests():
        engine.add(request)
    assert tokens_of(engine) == expected_tokens()
    assert runner.num_resets == 2
    assert "a step failed (attempt 1 of 3)" in caplog.text


@pytest.mark.parametrize("where", ["dispatch", "read"])
def test_after_a_failed_step_nothing_is_found_in_the_cache(where: str) -> None:
    failed: list[int] = []

    def fails_once(number: int, plan: StepPlan) -> str | None:
        if failed or not any(sequence.request.request_id == "second" for sequence in plan.sequences):
            return None
        failed.append(number)
        return where

    engine, _ = engine_of(fails_once)
    first, second = (
        Request.create(name, [*range(1, 60), last], SamplingParams(seed=4, max_tokens=6))
        for name, last in (("first", 1), ("second", 2))
    )
    engine.add(first)
    tokens_of(engine)
    engine.add(second)
    events = run_to_end(engine)["second", 0]
    sequence = events[0].sequence
    assert failed
    assert sequence.first_prefix is not None
    assert sequence.first_prefix.start > 0
    assert sequence.prefix is not None
    assert sequence.prefix.start == sequence.prefix.matched == 0
    alone = fake_engine(CONFIG)
    alone.add(second)
    assert tokens_of(alone)["second", 0] == [event.token_id for event in events]


@pytest.mark.parametrize("where", ["dispatch", "read"])
def test_requests_whose_step_keeps_failing_are_dropped(where: str) -> None:
    def poisoned(_: int, plan: StepPlan) -> str | None:
        return where if any(sequence.request.request_id == "bad" for sequence in plan.sequences) else None

    engine, runner = engine_of(poisoned)
    engine.add(Request.create("bad", range(1, 80), SamplingParams()))
    with pytest.raises(StepFailedError) as caught:
        run_to_end(engine)
    assert caught.value.request_ids == ("bad",)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert runner.num_resets == 1 + MAX_ATTEMPTS
    for request in requests():
        engine.add(request)
    assert tokens_of(engine) == expected_tokens()


def test_a_request_is_dropped_when_only_a_later_step_of_it_fails() -> None:
    def poisoned(_: int, plan: StepPlan) -> str | None:
        return (
            "read" if any(chunk.sequence.request.request_id == "bad" and chunk.start for chunk in plan.chunks) else None
        )

    engine, runner = engine_of(poisoned)
    engine.add(Request.create("bad", range(1, 80), SamplingParams()))
    with pytest.raises(StepFailedError):
        run_to_end(engine)
    assert runner.num_resets == 1 + MAX_ATTEMPTS


def test_a_request_that_took_the_id_of_one_that_ended_is_not_dropped() -> None:
    params = SamplingParams(max_tokens=3, seed=0)
    dispatched: list[StepPlan] = []

    def poisoned(_: int, plan: StepPlan) -> str | None:
        dispatched.append(plan)
        return "read" if any(s.request is bad for s in plan.sequences) else None

    engine, _ = engine_of(poisoned)
    bad = Request.create("bad", [1, 2, 3], SamplingParams())
    short = Request.create("short", [1, 2], params)
    engine.add(bad)
    engine.add(short)
    for _ in range(MAX_ATTEMPTS * 2 - 1):
        engine.step()
    engine.abort("short")  # its rows are still in the step that fails for the last time
    engine.add(Request.create("short", [1, 2], params))
    with pytest.raises(StepFailedError) as caught:
        engine.step()
    assert any(s.request is short for s in dispatched[-2].sequences)
    assert caught.value.request_ids == ("bad",)
    events = run_to_end(engine)
    assert len(events["short", 0]) == 3


def test_failures_with_good_steps_between_them_are_forgiven() -> None:
    engine, _ = engine_of(lambda number, _: "read" if number % 8 == 0 else None)
    for request in requests():
        engine.add(request)
    assert tokens_of(engine) == expected_tokens()


def test_a_broken_invariant_is_not_tried_again() -> None:
    class Wrong(FakeRunner):
        def dispatch(self, plan: StepPlan, batch: StepBatch) -> FakeHandle:
            raise AssertionError("S3")

    plain = fake_engine(CONFIG)
    runner = Wrong(plain.cache.layout, plain.buckets, CONFIG.max_num_seqs, CONFIG.vocab_size)
    engine = Engine(plain.scheduler, plain.cache, runner)
    engine.add(Request.create("a", [1], SamplingParams()))
    with pytest.raises(AssertionError, match="S3"):
        engine.step()
