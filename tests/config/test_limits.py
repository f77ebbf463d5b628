"""Limits of a step: what is unset follows what is set."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hkv_jax.config import EngineConfig, StepLimits, resolve_limits
from hkv_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("platform", "limits"),
    [
        ("cpu", StepLimits(16, 512, 512)),
        ("tpu", StepLimits(256, 2048, 2048)),
        ("gpu", StepLimits(256, 8192, 8192)),
        ("rocm", StepLimits(256, 8192, 8192)),
    ],
)
def test_defaults(platform: str, limits: StepLimits) -> None:
    assert resolve_limits(EngineConfig(), platform) == limits


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({"max_num_batched_tokens": 8}, StepLimits(8, 8, 8)),
        ({"max_num_seqs": 1000}, StepLimits(1000, 1000, 1000)),
        ({"max_num_seqs": 2}, StepLimits(2, 512, 512)),
        ({"max_prefill_chunk": 7}, StepLimits(16, 512, 7)),
        ({"max_prefill_chunk": 4096}, StepLimits(16, 4096, 4096)),
        ({"max_num_seqs": 3, "max_prefill_chunk": 5, "max_num_batched_tokens": 9}, StepLimits(3, 9, 5)),
    ],
)
def test_what_is_unset_follows(options: dict[str, Any], limits: StepLimits) -> None:
    assert resolve_limits(EngineConfig(**options), "cpu") == limits


settings = st.none() | st.integers(1, 3000)


@given(seqs=settings, tokens=settings, chunk=settings, platform=st.sampled_from(["cpu", "gpu", "tpu"]))
def test_what_is_set_stays_and_every_limit_is_within_the_budget(
    seqs: int | None, tokens: int | None, chunk: int | None, platform: str
) -> None:
    given = {"max_num_seqs": seqs, "max_num_batched_tokens": tokens, "max_prefill_chunk": chunk}
    fits = tokens is None or max(seqs or 1, chunk or 1) <= tokens
    try:
        limits = resolve_limits(EngineConfig.from_options(given), platform)
    except ConfigError:
        assert not fits
        return
    assert fits
    assert all(getattr(limits, name) == value for name, value in given.items() if value is not None)
    assert 1 <= limits.max_num_seqs <= limits.max_num_batched_tokens
    assert 1 <= limits.max_prefill_chunk <= limits.max_num_batched_tokens
