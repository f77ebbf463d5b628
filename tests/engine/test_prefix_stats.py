"""What the prefix cache saved is counted once a request."""

from __future__ import annotations

from hkv_jax.engine.prefix_stats import PrefixStats
from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.outputs import PrefixHit
from hkv_jax.testing.fake_engine import FakeEngineConfig, global_group, tight_config
from hkv_jax.testing.hand_driven import HandDriven


def test_tokens_of_a_prompt_are_either_found_or_computed() -> None:
    stats = PrefixStats()
    stats = stats.after_admission(100, PrefixUse(0, 0, PrefixHit.MISS, 0))
    stats = stats.after_admission(50, PrefixUse(48, 48, PrefixHit.RESIDENT, 0))
    stats = stats.after_admission(70, PrefixUse(32, 64, PrefixHit.REBUILD, 32))
    assert stats.hits == {PrefixHit.MISS: 1, PrefixHit.RESIDENT: 1, PrefixHit.REBUILD: 1, PrefixHit.TRUNCATE: 0}
    assert (stats.prompt_tokens, stats.prefix_hit_tokens, stats.computed_prompt_tokens) == (220, 80, 140)
    assert stats.rebuilt_tokens == 32
    assert stats.recomputed_tokens == 0


def test_who_runs_again_counts_apart() -> None:
    stats = PrefixStats().after_admission(100, PrefixUse(0, 0, PrefixHit.MISS, 0))
    again = stats.after_readmission(130, PrefixUse(96, 96, PrefixHit.RESIDENT, 0))
    assert again.recomputed_tokens == 34
    assert (again.hits, again.prompt_tokens) == (stats.hits, stats.prompt_tokens)


def test_the_scheduler_counts_each_request_at_its_first_admission() -> None:
    driven = HandDriven(FakeEngineConfig(groups=(global_group(),)))
    prompt = list(range(1, 21))
    # The second of the single token's samples is no request of its own.
    driven.add("single", [3], n=2, max_tokens=2)
    driven.add("a", prompt, n=2, max_tokens=2)
    while (plan := driven.try_plan()) is not None:
        driven.commit(plan)
    driven.add("b", prompt, max_tokens=2)
    driven.plan()
    stats = driven.scheduler.prefix_stats
    assert stats.hits == {PrefixHit.MISS: 2, PrefixHit.RESIDENT: 1, PrefixHit.REBUILD: 0, PrefixHit.TRUNCATE: 0}
    assert (stats.prompt_tokens, stats.prefix_hit_tokens, stats.computed_prompt_tokens) == (41, 16, 25)


def test_what_a_preemption_costs_is_recomputed(short_sighted: None) -> None:
    driven = HandDriven(tight_config(4, 32))
    driven.add("a", 15)
    driven.add("b", 15)
    first, second = driven.plan(), driven.plan()
    driven.commit(first)
    driven.commit(second)
    third = driven.plan()
    assert driven.scheduler.num_preemptions == 1
    driven.scheduler.abort("a")
    driven.commit(third)
    driven.plan()
    stats = driven.scheduler.prefix_stats
    # "b" knows 17 tokens, the first 8 of which it finds.
    assert stats.recomputed_tokens == 9
    assert stats.computed_prompt_tokens == 30
