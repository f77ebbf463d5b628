"""A question to a document whose sliding tail is gone, in the real cache."""

from __future__ import annotations

from tools.cache_bench.lost_tails import QUESTION_TOKENS, LostTail


def test_a_rebuild_runs_the_receptive_length_and_a_truncation_everything() -> None:
    tail = LostTail("gpt-oss-20b", 8192)
    # 11 layers below the last carry 127 tokens each; the tail is eight blocks of 16.
    assert tail.rebuild_tokens == 11 * 127 + 128
    # The start is rounded down to a block of 64.
    assert tail.tokens_run(rebuild=True) == 1536 + QUESTION_TOKENS
    assert tail.tokens_run(rebuild=False) == 8192 + QUESTION_TOKENS


def test_a_model_with_a_long_reach_gains_nothing_on_a_short_document() -> None:
    tail = LostTail("gemma3-1b", 8192)
    assert tail.rebuild_tokens > 8192
    assert tail.tokens_run(rebuild=True) == tail.tokens_run(rebuild=False)


def test_a_document_longer_than_the_model_does_not_fit() -> None:
    assert LostTail("gemma3-270m", 16_384).fits
    assert not LostTail("gemma3-270m", 65_536).fits
