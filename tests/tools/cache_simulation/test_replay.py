"""Replays through the real scheduler and cache: time, forced outputs, and what is counted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hkv_jax.engine.plan import BlockCopy, StepPlan
from tests.tools.cache_simulation.tiny_simulation import request, tiny_simulation
from tools.cache_simulation import replay as replay_module
from tools.cache_simulation.measurements import Measurements
from tools.cache_simulation.replay import Replay, StuckError
from tools.cache_simulation.token_ids import output_ids
from tools.cache_simulation.trace import TraceRequest

PROMPT = [("prompt", 100)]


def run(requests: list[TraceRequest], policy: str = "hybrid", **options: object) -> Measurements:
    return tiny_simulation(requests, policy, **options).run()


def test_one_request_takes_a_prefill_step_and_a_step_a_token() -> None:
    measured = run([request("a", PROMPT, 3)])
    assert measured.ttfts == [pytest.approx(0.025 + 100 * 20e-6)]
    assert measured.virtual_s == pytest.approx(3 * 0.025 + 100 * 20e-6)
    assert (measured.steps, measured.finished, measured.peak_running, measured.scheduled) == (3, 1, 1, 3)


def test_nothing_happens_until_somebody_comes() -> None:
    measured = run([request("a", PROMPT, 3, arrival=5.0)])
    assert measured.ttfts == [pytest.approx(0.027)]
    assert measured.virtual_s == pytest.approx(5.077)


def test_a_first_token_counts_from_the_boundary_at_which_its_request_was_submitted() -> None:
    measured = run([request("a", PROMPT, 4), request("b", [("other", 50)], 1, arrival=0.001)])
    # The first step ends at 0.027; the second takes b's prompt beside a's token.
    assert measured.ttfts == [pytest.approx(0.027), pytest.approx(0.025 + 50 * 20e-6)]
    assert measured.virtual_s == pytest.approx(0.027 + 0.026 + 2 * 0.025)


def test_a_turn_follows_the_end_of_the_one_before_and_finds_it_in_the_cache() -> None:
    first = request("a", PROMPT, 60)
    second = request("b", [*PROMPT, ("out:a", 60), ("more", 10)], 2, after="a", think=2.0)
    measured = run([first, second])
    # 159 tokens of the first have K/V; blocks have 32 tokens.
    assert measured.prefix_hit_tokens == 128
    assert measured.virtual_s == pytest.approx(60 * 0.025 + 100 * 20e-6 + 2.0 + 2 * 0.025 + 42 * 20e-6)
    assert measured.hits == {"resident": 1, "rebuild": 0, "truncate": 0, "miss": 1}


def test_a_prompt_that_is_cached_whole_computes_its_last_block() -> None:
    measured = run([request("a", [("prompt", 256)], 1), request("b", [("prompt", 256)], 1, arrival=1.0)])
    assert measured.prefix_hit_tokens == 224
    report = measured.to_json()
    assert report["computed_prompt_tokens"] == 512 - 224


def test_outputs_are_those_of_the_trace() -> None:
    one = request("a", PROMPT, 20)
    seen: list[list[int]] = []

    def look(replay: Replay) -> None:
        seen.extend(list(other.output_token_ids) for other in replay.scheduler.lanes.running())

    tiny_simulation([one]).run(look)
    assert seen[-1] == output_ids(one).tolist()[:19]


def test_without_a_cache_nothing_is_found() -> None:
    twice = [request("a", PROMPT, 1), request("b", PROMPT, 1, arrival=1.0)]
    assert run(twice).prefix_hit_tokens == 96
    assert run(twice, "no-cache").prefix_hit_tokens == 0


def test_what_cannot_be_served_is_refused_and_its_turns_come_all_the_same() -> None:
    measured = run([request("a", [("long", 3000)], 1), request("b", PROMPT, 1, after="a", think=1.0)])
    assert (measured.requests, measured.finished) == (2, 1)
    assert measured.virtual_s == pytest.approx(1.027)
    assert sum(measured.hits.values()) == 1


def test_an_output_ends_where_the_sequence_must() -> None:
    measured = run([request("a", PROMPT, 200)], max_model_len=128)
    assert (measured.finished, measured.steps) == (1, 28)


def test_moved_blocks_take_time() -> None:
    replay = tiny_simulation([request("a", PROMPT, 1)]).replay()
    schedule = replay.scheduler.schedule

    def with_copies() -> StepPlan | None:
        plan = schedule()
        return plan and dataclasses.replace(plan, copies=(BlockCopy(0, 0, 1), BlockCopy(1, 0, 2)))

    replay.scheduler.schedule = with_copies  # type: ignore[method-assign]
    measured = replay.run()
    copied = sum(group.format.block_bytes for group in replay.cache.layout.groups)
    assert measured.copied_bytes == copied
    assert measured.virtual_s == pytest.approx(0.027 + copied / 500e9, abs=1e-12)


def test_what_the_boundary_copies_is_what_steps_are_charged_for() -> None:
    # Long prompts, many short ones, long ones again: the boundary goes there and back.
    requests = [request(f"long{i}", [(f"long{i}", 1500)], 20, 0.2 * i) for i in range(6)]
    requests += [request(f"short{i}", [(f"short{i}", 40)], 60, 4.0 + 0.01 * i) for i in range(40)]
    requests += [request(f"late{i}", [(f"late{i}", 1500)], 20, 6.0 + 0.2 * i) for i in range(6)]
    blocks = {"global": 64, "sliding": 16}  # two sliding blocks in a slab
    options: dict[str, Any] = {"kv_cache_memory": 1_500_000, "max_num_seqs": 32, "block_size": blocks}
    replay = tiny_simulation(requests, **options).replay()
    measured = replay.run()
    assert measured.copied_bytes == replay.cache.copied_bytes > 0
    assert measured.slabs_moved > 0


def test_a_scheduler_that_never_runs_anybody_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_module, "MAX_IDLE_STEPS", 10)
    replay = tiny_simulation([request("a", PROMPT, 1)]).replay()
    replay.scheduler.schedule = lambda: None  # type: ignore[method-assign]
    with pytest.raises(StuckError, match=r"1 requests wait at 0\.2 s"):
        replay.run()


def test_the_report_has_the_promised_keys_and_adds_up() -> None:
    requests = [request(f"r{i}", [("shared", 64 * (i % 3 + 1)), (f"own{i}", 40)], 30, 0.02 * i) for i in range(12)]
    report = run(requests).to_json()
    assert list(report) == [
        *("requests", "finished", "steps", "virtual_s", "peak_running", "mean_running", "preemptions"),
        *("prompt_tokens", "prefix_hit_tokens", "rebuilt_tokens", "computed_prompt_tokens", "recomputed_tokens"),
        *("hits", "pools", "released_early_blocks", "slabs_moved", "copied_bytes"),
        *("ttft_p50_s", "ttft_p99_s", "ttft_mean_s", "host_us_per_scheduled_request"),
    ]
    assert report["prompt_tokens"] == sum(one.prompt_len for one in requests)
    hits, pools = report["hits"], report["pools"]
    assert isinstance(hits, dict) and isinstance(pools, dict)
    assert list(hits) == ["resident", "rebuild", "truncate", "miss"]
    assert sum(hits.values()) == 12
    assert list(pools) == ["global", "sliding"]
    assert set(pools["global"]) == {"num_blocks", "peak_used_blocks", "block_bytes"}
    assert pools["global"]["block_bytes"] == 32 * 128 * 2


def test_the_same_replay_gives_the_same_figures() -> None:
    requests = [request(f"r{i}", [("shared", 100), (f"own{i}", 40)], 30, 0.1 * i) for i in range(12)]
    first, second = (dict(run(requests).to_json()) for _ in range(2))
    del first["host_us_per_scheduled_request"], second["host_us_per_scheduled_request"]
    assert first == second


def test_preempted_work_is_counted_as_repeated_and_not_as_prompt() -> None:
    requests = [request(f"r{i}", [(f"own{i}", 200)], 1800) for i in range(8)]
    measured = run(requests, kv_cache_memory=1_200_000)
    assert measured.preemptions > 0
    assert measured.recomputed_tokens > 0
    assert measured.to_json()["computed_prompt_tokens"] == 8 * 200 - measured.prefix_hit_tokens
    assert measured.finished == 8
