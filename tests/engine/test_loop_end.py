"""How the loop ends, and how requests end that something goes wrong with."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable

import pytest

from hkv_jax.engine.engine import StepFailedError
from hkv_jax.engine.loop import EngineLoop
from hkv_jax.engine.outbox import RequestStream
from hkv_jax.engine.request import Request
from hkv_jax.errors import EngineStoppedError, InternalError, RequestError
from hkv_jax.outputs import FinishReason
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.fake_engine import fake_engine
from hkv_jax.testing.stepped_engine import PATIENCE_SECONDS, SteppedEngine

Opener = Callable[..., EngineLoop]

PROMPT = [5, 6, 7]
ENDLESS = SamplingParams(ignore_eos=True, seed=0)


def test_closing_ends_everything_and_twice_does_no_harm(open_loop: Opener, stepped: SteppedEngine) -> None:
    loop = open_loop(stepped)
    stream = loop.submit(PROMPT, ENDLESS)
    stepped.run(4)
    stepped.run_freely()
    loop.close()
    loop.close()
    assert not loop.running
    with pytest.raises(EngineStoppedError, match="closed before the request ended"):
        list(stream)
    with pytest.raises(EngineStoppedError, match="the engine was closed; it takes no more requests"):
        loop.submit(PROMPT)
    assert not loop.abort(stream.request_id)
    stream.abort()
    assert loop.stats().num_added_requests == 1


def test_draining_lets_requests_end(open_loop: Opener, stepped: SteppedEngine) -> None:
    loop = open_loop(stepped)
    streams = [loop.submit(PROMPT, ENDLESS.replace(max_tokens=15)) for _ in range(3)]
    stepped.run_freely()
    loop.close(drain=True)
    assert [stream.result().outputs[0].finish_reason for stream in streams] == [FinishReason.LENGTH] * 3


def test_a_close_can_cut_a_drain_short(open_loop: Opener, stepped: SteppedEngine) -> None:
    loop = open_loop(stepped)
    stream = loop.submit(PROMPT, ENDLESS)
    draining = threading.Thread(target=lambda: loop.close(drain=True))
    closing = threading.Thread(target=loop.close)
    draining.start()
    with loop._condition:
        assert loop._condition.wait_for(lambda: loop._draining, PATIENCE_SECONDS)
    stepped.run(3)
    closing.start()
    with loop._condition:
        assert loop._condition.wait_for(lambda: not loop._draining, PATIENCE_SECONDS)
    stepped.run_freely()
    draining.join()
    closing.join()
    with pytest.raises(EngineStoppedError):
        list(stream)


def test_a_closed_loop_lets_go_of_the_engine(open_loop: Opener) -> None:
    engine = fake_engine()
    gone = weakref.ref(engine)
    loop = open_loop(engine)
    del engine
    stream = loop.submit(PROMPT, SamplingParams(max_tokens=3))
    stream.result()
    loop.close()
    gc.collect()
    assert gone() is None


def test_an_unexpected_exception_stops_the_loop_and_tells_only_an_id(
    open_loop: Opener, stepped: SteppedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    loop = open_loop(stepped)
    streams = [loop.submit(PROMPT, ENDLESS) for _ in range(2)]
    stepped.fail(ValueError("a secret"))
    with caplog.at_level(logging.ERROR):
        ids = {internal_error_of(stream) for stream in streams}
        loop.close()
    assert len(ids) == 1
    (record,) = caplog.records
    assert f"internal error {ids.pop()}: the engine has stopped" in record.getMessage()
    assert record.exc_info is not None
    with pytest.raises(EngineStoppedError, match="the engine has stopped after internal error"):
        loop.submit(PROMPT)


def internal_error_of(stream: RequestStream) -> str:
    with pytest.raises(InternalError) as raised:
        list(stream)
    assert "secret" not in str(raised.value)
    return raised.value.error_id


def test_a_step_that_keeps_failing_costs_its_own_requests_only(
    open_loop: Opener, stepped: SteppedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    loop = open_loop(stepped)
    victim = loop.submit(PROMPT, ENDLESS, request_id="victim")
    other = loop.submit(PROMPT, ENDLESS.replace(max_tokens=3), request_id="other")
    stepped.run(2)
    stepped.abort("victim")  # what the engine has done when it says so
    stepped.fail(StepFailedError(("victim",)))
    stepped.run_freely()
    with caplog.at_level(logging.ERROR):
        internal_error_of(victim)
    assert other.result().outputs[0].finish_reason is FinishReason.LENGTH
    assert len(caplog.records) == 1
    assert loop.running


def test_a_callback_that_raises_costs_its_own_request_only(
    open_loop: Opener, stepped: SteppedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    loop = open_loop(stepped)
    victim = loop.submit(PROMPT, ENDLESS)
    other = loop.submit(PROMPT, ENDLESS.replace(max_tokens=9))

    def raises() -> None:
        raise ValueError("a secret")

    victim.set_on_ready(raises)
    stepped.run_freely()
    with caplog.at_level(logging.ERROR):
        internal_error_of(victim)
        assert other.result().outputs[0].finish_reason is FinishReason.LENGTH
    assert len(caplog.records) == 1
    assert loop.submit(PROMPT, SamplingParams(max_tokens=1)).result()
    loop.close()
    assert stepped.used_blocks == 0


def test_a_request_the_engine_refuses_ends_with_its_error(open_loop: Opener, stepped: SteppedEngine) -> None:
    loop = open_loop(stepped)

    def refuse(request: Request) -> None:
        raise RequestError(f"{request.prompt_len} tokens are too many today")

    stepped.add = refuse
    stream = loop.submit(PROMPT)
    with pytest.raises(RequestError, match="3 tokens are too many today"):
        stream.result()
    assert loop.stats().num_requests == 0


def test_a_callback_that_raises_at_the_end_leaves_the_next_request_of_that_id_alone(
    open_loop: Opener, stepped: SteppedEngine
) -> None:
    loop = open_loop(stepped)
    first = loop.submit(PROMPT, ENDLESS.replace(max_tokens=1), request_id="r")
    successors = []
    submitted = threading.Event()

    def takes_the_id_and_raises() -> None:
        successors.append(loop.submit(PROMPT, ENDLESS.replace(max_tokens=3), request_id="r"))
        submitted.set()
        raise ValueError("a secret")

    first.set_on_end(takes_the_id_and_raises)
    stepped.run_freely()
    assert first.result().outputs[0].finish_reason is FinishReason.LENGTH
    assert submitted.wait(PATIENCE_SECONDS)  # the result is there before the callback has run
    loop.close(drain=True)
    (second,) = successors
    assert len(second.result().outputs[0].token_ids) == 3
