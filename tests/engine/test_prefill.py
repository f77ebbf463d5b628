"""How known tokens are cut, and where later requests will be able to join."""

from __future__ import annotations

import pytest

from hkv_jax.engine.prefill import Prefill
from hkv_jax.engine.request import Request, Sequence
from hkv_jax.kvcache.prefix_match import NO_PREFIX, PrefixUse
from hkv_jax.outputs import PrefixHit
from hkv_jax.sampling_params import SamplingParams

SIZE = 8


def sequence(prompt_len: int, outputs: int = 0) -> Sequence:
    prompt = [i % 50 for i in range(prompt_len)]
    made = Sequence.create(Request.create("a", prompt, SamplingParams()), 0, 0, 1000)
    made.output_token_ids.extend(range(outputs))
    return made


def prefill(prompt_len: int, outputs: int = 0, use: PrefixUse = NO_PREFIX) -> Prefill:
    made = sequence(prompt_len, outputs)
    result = Prefill.of(made, made.num_tokens, SIZE)
    result.plan_checkpoints(made.num_tokens, use)
    return result


@pytest.mark.parametrize(("num_tokens", "blocks", "limit"), [(1, 0, 0), (8, 1, 0), (9, 1, 1), (16, 2, 1), (17, 2, 2)])
def test_the_block_of_the_last_token_is_never_matched(num_tokens: int, blocks: int, limit: int) -> None:
    made = prefill(num_tokens)
    assert (len(made.chain.digests), made.path.limit) == (blocks, limit)


def test_outputs_are_part_of_what_is_known() -> None:
    assert prefill(5, outputs=12).chain.num_tokens == 16
    assert prefill(5, outputs=12).path.limit == 2


def test_digests_follow_the_tokens_as_they_come() -> None:
    made, grown = sequence(10), sequence(10)
    growing = Prefill.of(grown, 10, SIZE)
    for number in range(30):
        for each in (made, grown):
            each.output_token_ids.append(number)
        growing.extend(grown, grown.num_tokens)
        assert growing.chain.digests == Prefill.of(made, made.num_tokens, SIZE).chain.digests


def test_samples_share_what_was_computed_but_not_what_follows() -> None:
    made = sequence(20)
    leader = Prefill.of(made, 19, SIZE)
    sibling = leader.of_sibling()
    assert sibling.chain.digests == leader.chain.digests
    made.output_token_ids.extend(range(8))
    sibling.extend(made, 28)
    assert len(sibling.chain.digests) == 3
    assert len(leader.chain.digests) == 2
    assert sibling.path.limit == 0


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 16, 40, 41, 47, 300])
def test_join_points_are_left_before_the_end(num_tokens: int) -> None:
    points = prefill(num_tokens).checkpoints
    wanted = {(num_tokens - 1) // SIZE * SIZE, num_tokens // SIZE * SIZE} - {0}
    assert wanted <= set(points)
    assert all(point % SIZE == 0 and 0 < point <= num_tokens for point in points)
    assert list(points) == sorted(points)


def test_none_is_left_where_nothing_is_computed() -> None:
    use = PrefixUse(296, 296, PrefixHit.RESIDENT, 0)
    assert prefill(301, use=use).checkpoints == {}
    assert min(prefill(320, use=use).checkpoints) > 296


def test_a_prefix_whose_tail_was_gone_gets_one_again() -> None:
    use = PrefixUse(64, 104, PrefixHit.REBUILD, 64)
    assert 104 in prefill(600, use=use).checkpoints
    assert 104 not in prefill(600).checkpoints


def test_a_chunk_keeps_the_window_before_its_first_join_point() -> None:
    made = prefill(300)
    points = sorted(made.checkpoints)
    first = points[0]
    assert made.keep_from(0, 300) == first
    assert made.keep_from(0, first) == first
    assert made.keep_from(0, first - 1) == first - 1
    assert made.keep_from(first, 300) == min([p for p in points if p > first] or [300])
    assert made.keep_from(296, 300) == 300


def test_a_join_point_far_inside_a_chunk_ends_it() -> None:
    made = prefill(4000)
    points = sorted(made.checkpoints)
    assert made.first_deep_checkpoint(0, points[0] + SIZE) is None
    use = PrefixUse(0, 800, PrefixHit.MISS, 0)
    branched = prefill(4000, use=use)
    assert branched.first_deep_checkpoint(0, 4000) == 800
    assert branched.first_deep_checkpoint(800, 4000) in {None, *points}
    assert branched.first_deep_checkpoint(0, 804) is None


def test_a_sequence_nobody_looks_for_has_no_prefix() -> None:
    empty = Prefill.empty()
    assert empty.chain.digests == []
    assert empty.path.matched == 0
    assert empty.path.next_digest is None
