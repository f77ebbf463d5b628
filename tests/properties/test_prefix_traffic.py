"""Random interleavings of requests that share prefixes, in pools too small for them; shrinking ones, and long ones.

The fake device (``hkv_jax.testing.fake_runner``) knows which K/V is exact, which is polluted by a rebuild and whose it
is: every block that a hit brings must hold the right tokens, whatever was evicted, moved, preempted or aborted
meanwhile. ``test_traffic_layouts`` runs the other half of the 100,000 steps, beside this one.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.outputs import PrefixHit
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.prefix_traffic import PrefixTraffic
from tests.properties.prefix_traffic_cases import BASE, CASES, POOLS, run_ten_thousand_steps

pytestmark = pytest.mark.usefixtures("short_prompts")


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLS)
def test_ten_thousand_steps(name: str) -> None:
    run_ten_thousand_steps(name)


def test_without_a_cache_nothing_is_found() -> None:
    traffic = PrefixTraffic(BASE, seed=1, policy=CachePolicy(enabled=False))
    traffic.run(300, full_check_every=1)
    traffic.drain()
    assert set(traffic.hits) == {PrefixHit.MISS}


class PrefixMachine(RuleBasedStateMachine):
    """The same engine under actions that Hypothesis chooses and can take back; every invariant after each."""

    @initialize(name=st.sampled_from(["tiny pools", "small chunks", "two windows", "two arenas", "all sliding"]))
    def begin(self, name: str) -> None:
        self.traffic = PrefixTraffic(CASES[name].config, seed=0)

    @rule(
        document=st.integers(0, 1),
        cut=st.integers(1, 70),
        question=st.lists(st.integers(0, 22), max_size=6),
        max_tokens=st.integers(1, 12),
        samples=st.sampled_from([1, 1, 2]),
    )
    def ask(self, document: int, cut: int, question: list[int], max_tokens: int, samples: int) -> None:
        prompt = [*self.traffic.documents[document][:cut], *question]
        self.traffic.submit(prompt, SamplingParams(max_tokens=max_tokens, seed=cut, n=samples))

    @rule(which=st.integers(0, 30), more=st.lists(st.integers(0, 22), max_size=6))
    def go_on(self, which: int, more: list[int]) -> None:
        conversations = self.traffic.conversations
        if conversations:
            prompt = [*conversations[which % len(conversations)], *more][:90]
            self.traffic.submit(prompt, SamplingParams(max_tokens=5, seed=which))

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.traffic.step()

    @rule()
    def abort(self) -> None:
        self.traffic.abort()

    @rule()
    def stop(self) -> None:
        self.traffic.stop()

    @rule()
    def fail(self) -> None:
        self.traffic.fail()

    @rule(seconds=st.sampled_from([0.3, 0.7, 3.0]))
    def wait(self, seconds: float) -> None:
        self.traffic.now += seconds

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.check()

    def teardown(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.drain()


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = settings(
    max_examples=40, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestPrefixMachine = pytest.mark.slow(TestPrefixMachine)
