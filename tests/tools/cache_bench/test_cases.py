"""A run of the cache benchmark is the simulation it says."""

from __future__ import annotations

import pytest

from hkv_jax.errors import ConfigError
from hkv_jax.spec import LayerKind
from tools.cache_bench.cases import Case, Run, measure
from tools.cache_simulation.generators import GENERATORS


def test_a_run_has_the_limits_of_the_comparison() -> None:
    run = Run(Case("chat", "gpt-oss-20b", 1), "no-rebuild", "static", expected=3000)
    simulation = run.simulation()
    config = simulation.config
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len) == (1024, 8192, 16_384)
    assert (config.kv_cache_memory, config.kv_partition, config.expected_average_seq_length) == (2**30, "static", 3000)
    assert (simulation.policy, len(simulation.requests)) == ("no-rebuild", 892)
    assert str(run) == "chat, gpt-oss-20b, 1 GiB, no-rebuild, static, E 3000"
    assert Case("docqa", "gpt-oss-20b", 4).max_model_len == 65_536


def test_a_seed_asks_for_a_generated_trace() -> None:
    case = Case("mixed", "gemma3-27b", 12, seed=2)
    assert case.requests() == GENERATORS["mixed"](2)
    lengths = [one.prompt_len + one.output_len for one in case.requests()]
    assert case.mean_length() == pytest.approx(sum(lengths) / len(lengths), abs=0.5)


def test_a_share_splits_the_memory() -> None:
    layout = Run(Case("docqa", "gemma3-27b", 12), partition="static", share=0.5).simulation().replay().cache.layout
    bytes_of = {group.spec.kind: group.num_bytes for group in layout.groups}
    assert bytes_of[LayerKind.GLOBAL] == pytest.approx(6 * 2**30, rel=0.01)


def test_a_cache_without_windows_is_asked_for_no_more_than_the_trace_has() -> None:
    run = Run(Case("docqa", "gemma3-27b", 30), "all-global")
    longest = max(one.prompt_len + one.output_len for one in run.case.requests())
    assert run.simulation().replay().cache.layout.max_model_len == longest < 65_536


def test_memory_that_holds_no_such_request_gives_no_result() -> None:
    assert measure(Run(Case("docqa", "gemma3-27b", 12), "all-global")) is None


def test_a_model_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no-such-model\.json: cannot be read"):
        measure(Run(Case("docqa", "no-such-model", 12)))
