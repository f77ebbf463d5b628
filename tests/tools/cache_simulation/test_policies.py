"""The policies that are compared differ in what they say they differ in."""

from __future__ import annotations

import pytest

from tests.tools.cache_simulation.tiny_simulation import request, tiny_simulation
from tools.cache_simulation.policies import POLICIES
from tools.cache_simulation.trace import TraceRequest


def same_prompt_after_noise() -> list[TraceRequest]:
    """A prompt, so much else that sliding blocks without a purpose are used up, and the prompt again."""
    noise = [request(f"noise{i}", [(f"noise{i}", 900)], 40, 10.0 + i) for i in range(4)]
    first = request("first", [("document", 800), ("one", 40)], 1)
    return [first, *noise, request("second", [("document", 800), ("two", 40)], 1, 100.0)]


def hits(policy: str, **options: object) -> dict[str, int]:
    return tiny_simulation(same_prompt_after_noise(), policy, **options).run().hits


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_ends_a_trace(policy: str) -> None:
    measured = tiny_simulation(same_prompt_after_noise(), policy).run()
    assert measured.finished == 6


def test_a_cache_without_windows_keeps_all_layers_alike() -> None:
    replay = tiny_simulation([request("a", [("prompt", 100)], 2)], "all-global").replay()
    assert [group.spec.num_layers for group in replay.cache.layout.groups] == [3]
    assert replay.run().released_early_blocks == 0


def test_without_tails_a_prefix_is_rebuilt_or_lost() -> None:
    small = {"kv_cache_memory": 3_000_000, "kv_partition": "static", "expected_average_seq_length": 512}
    assert hits("hybrid", **small) == {"resident": 1, "rebuild": 0, "truncate": 0, "miss": 5}
    assert hits("no-tails", **small) == {"resident": 0, "rebuild": 1, "truncate": 0, "miss": 5}
    assert hits("no-tails-no-rebuild", **small) == {"resident": 0, "rebuild": 0, "truncate": 0, "miss": 6}
    assert hits("no-cache", **small) == {"resident": 0, "rebuild": 0, "truncate": 0, "miss": 6}
