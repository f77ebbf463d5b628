"""The border: what a plan looks like in the buffers, and that every broken rule is noticed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hkv_jax.engine.batch import StepBatch, build
from hkv_jax.engine.batch_check import check
from hkv_jax.engine.batch_format import NO_TOKEN, StepFields
from hkv_jax.engine.engine import Engine
from hkv_jax.engine.lanes import FLOAT_FIELDS
from hkv_jax.engine.request import Request
from hkv_jax.engine.step_result import StepResult
from hkv_jax.kvcache.format import NO_SLOT
from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.fake_engine import FakeEngineConfig, fake_engine

CONFIG = FakeEngineConfig()  # global blocks of 8 tokens, sliding of 4 with a window of 10; 8 lanes
NUM_LANES = CONFIG.max_num_seqs
PADDING = NUM_LANES


def next_batch(engine: Engine, commit_token: int | None = None) -> StepBatch:
    plan = engine.scheduler.schedule()
    assert plan is not None
    batch = build(plan, engine.cache, engine.scheduler.lanes, engine.buckets)
    if commit_token is not None:
        engine.scheduler.commit(plan, StepResult(np.full(plan.num_rows, commit_token, np.int32)))
    return batch


def add(engine: Engine, name: str, prompt: list[int], **params: object) -> None:
    engine.add(Request.create(name, prompt, SamplingParams(**params)))  # type: ignore[arg-type]


@pytest.fixture
def mixed() -> tuple[Engine, StepBatch]:
    """One row that decodes, one chunk of a single token, one that ends its prompt, one that does not.

    Nothing is kept for later requests, so that a block that has left the window within its own chunk gets no memory.
    """
    engine = fake_engine(CONFIG, CachePolicy(enabled=False))
    add(engine, "decodes", [20, 21, 22], seed=(5 << 32) + 6, temperature=0.5, min_tokens=2)
    next_batch(engine, commit_token=30)
    add(engine, "ends", [40, 41, 42, 43, 44], seed=1, n=1, logprobs=3, top_k=7, prompt_logprobs=4)
    add(engine, "single", [50], seed=2, top_p=0.25)
    add(engine, "goes on", list(range(60, 90)), seed=3)
    return engine, next_batch(engine)


def test_rows_and_tokens_lie_one_after_the_other(mixed: tuple[Engine, StepBatch]) -> None:
    _, batch = mixed
    fields = batch.fields
    assert batch.format.bucket == (32, 8, True)
    assert fields.num_rows.tolist() == [4]
    assert fields.num_decode_rows.tolist() == [2]
    assert fields.query_starts.tolist() == [0, 1, 2, 7, 31, 31, 31, 31, 31]
    assert fields.lanes.tolist() == [0, 2, 1, 3] + [PADDING] * 4
    assert fields.start_positions[:4].tolist() == [3, 0, 0, 0]
    assert fields.prompt_lens[:4].tolist() == [3, 1, 5, 30]
    assert fields.tokens[:31].tolist() == [NO_TOKEN, 50, 40, 41, 42, 43, 44, *range(60, 84)]
    assert fields.positions[:31].tolist() == [3, 0, *range(5), *range(24)]
    assert fields.sample_tokens.tolist() == [0, 1, 6] + [NO_TOKEN] * 5


def test_draws_know_seed_sample_and_output_position(mixed: tuple[Engine, StepBatch]) -> None:
    fields = mixed[1].fields
    assert fields.seeds[:4].tolist() == [[5, 6], [0, 2], [0, 1], [0, 3]]
    assert fields.samples[:4].tolist() == [0] * 4
    assert fields.output_positions[:4].tolist() == [1, 0, 0, 0]
    assert fields.suppress_stops[:4].tolist() == [1, 0, 0, 0]
    assert fields.top_k[:4].tolist() == [0, 0, 7, 0]
    assert fields.temperature[:4].tolist() == [0.5, 1, 1, 1]
    assert fields.top_p.tolist() == [1, 0.25, 1, 1, 1, 1, 1, 1]
    assert fields.repetition_penalty.tolist() == [1] * 8
    assert fields.temperature[4:].tolist() == [0] * 4


def test_float_rows_are_in_the_order_of_the_buffer() -> None:
    assert StepFields._fields[-len(FLOAT_FIELDS) :] == FLOAT_FIELDS


def test_prompt_logprobs_have_the_following_token_as_target(mixed: tuple[Engine, StepBatch]) -> None:
    _, batch = mixed
    fields = batch.fields
    assert batch.wants_logprobs
    assert batch.wants_prompt_logprobs
    assert fields.num_logprobs.tolist() == [0, 0, 4, 0, 0, 0, 0, 0]
    assert fields.num_prompt_logprobs.tolist() == [0, 0, 5, 0, 0, 0, 0, 0]
    assert fields.targets.tolist() == [NO_TOKEN] * 2 + [41, 42, 43, 44] + [NO_TOKEN] * 26


def test_slots_are_where_the_table_says(mixed: tuple[Engine, StepBatch]) -> None:
    engine, batch = mixed
    fields = batch.fields
    rows = np.repeat(np.arange(4), np.diff(fields.query_starts)[:4])
    for number, (slots, size) in enumerate(zip(fields.slots, (8, 4), strict=True)):
        for index, row in enumerate(rows.tolist()):
            table = engine.cache.table_row(number, int(fields.lanes[row]))
            position = int(fields.positions[index])
            expected = table[position // size % len(table)] * size + position % size
            if number == 1 and row == 3 and position < 12:  # the block has left the window of token 24
                expected = NO_SLOT
            assert slots[index] == expected
        assert np.all(slots[31:] == NO_SLOT)


def test_table_updates_build_the_tables(mixed: tuple[Engine, StepBatch]) -> None:
    engine, batch = mixed
    for number, updates in enumerate(batch.fields.table_updates):
        live = updates[updates[:, 0] != PADDING]
        for lane, column, page in live.tolist():
            assert engine.cache.table_row(number, lane)[column] == page
        assert set(live[:, 0].tolist()) == {1, 2, 3}, "the decode row has all its blocks"
        assert len(engine.cache.take_table_updates(number)) == 0, "they travel once"


def test_a_decode_step_uses_the_small_program_and_asks_for_nothing() -> None:
    engine = fake_engine(CONFIG)
    for name in "abc":
        add(engine, name, [1, 2])
    next_batch(engine, commit_token=3)
    batch = next_batch(engine)
    assert batch.format.bucket == (4, 4, False)
    assert batch.fields.targets.shape == (0,)
    assert batch.fields.tokens[:3].tolist() == [NO_TOKEN] * 3
    assert not batch.wants_logprobs
    assert not batch.wants_prompt_logprobs


def test_tokens_after_the_prompt_are_recomputed_as_output() -> None:
    engine = fake_engine(CONFIG)
    add(engine, "a", [1, 2, 3])
    for token in (10, 11):
        next_batch(engine, commit_token=token)
    engine.scheduler.reset()
    fields = next_batch(engine).fields
    assert fields.tokens[:5].tolist() == [1, 2, 3, 10, 11]
    assert fields.prompt_lens[0] == 3
    assert fields.output_positions[0] == 2


def test_buffers_are_not_shared_between_steps() -> None:
    engine = fake_engine(CONFIG)
    add(engine, "a", [1, 2, 3])
    first = next_batch(engine, commit_token=10)
    kept = first.ints.copy()
    next_batch(engine)
    assert np.array_equal(first.ints, kept)


def test_a_row_knows_where_its_sliding_context_starts(mixed: tuple[Engine, StepBatch]) -> None:
    engine, first = mixed
    assert not first.fields.context_starts.any()
    engine.scheduler.lanes.context_starts[3] = 16  # of the prompt that goes on, at 24
    fields = next_batch(engine).fields
    row = fields.lanes.tolist().index(3)
    assert fields.start_positions[row] == 24
    assert np.flatnonzero(fields.context_starts).tolist() == [row]
    assert fields.context_starts[row] == 16


def test_a_context_start_is_a_whole_number_of_blocks(mixed: tuple[Engine, StepBatch]) -> None:
    engine, _ = mixed
    for start, rule in ((4, "within a block"), (8, None)):
        engine.scheduler.lanes.context_starts[3] = start
        batch = next_batch(engine, commit_token=7)
        if rule is None:
            check(batch, engine.cache.layout, NUM_LANES)
            continue
        with pytest.raises(AssertionError, match=rule):
            check(batch, engine.cache.layout, NUM_LANES)


def test_padding_rows_have_no_context(mixed: tuple[Engine, StepBatch]) -> None:
    engine, batch = mixed
    batch.fields.start_positions[7] = batch.fields.context_starts[7] = 8
    with pytest.raises(AssertionError, match="padding rows have no context"):
        check(batch, engine.cache.layout, NUM_LANES)


Breakage = Callable[[StepFields], None]


def set_value(field: str, index: int | tuple[int, ...], value: int) -> Breakage:
    def apply(fields: StepFields) -> None:
        getattr(fields, field)[index] = value

    return apply


def set_group_value(field: str, index: int | tuple[int, ...], value: int) -> Breakage:
    def apply(fields: StepFields) -> None:
        getattr(fields, field)[1][index] = value

    return apply


def repeat_slot(fields: StepFields) -> None:
    fields.slots[0][3] = fields.slots[0][2]


def repeat_update(fields: StepFields) -> None:
    fields.table_updates[0][1] = fields.table_updates[0][0]


@pytest.mark.parametrize(
    ("breakage", "rule"),
    [
        (set_value("num_rows", 0, 9), "S3"),
        (set_value("query_starts", 0, 1), "token 0"),
        (set_value("query_starts", 8, 32), "padded with its last"),
        (set_value("query_starts", 2, 3), "decode rows have one token"),
        (set_value("num_decode_rows", 0, 1), "one token come first"),
        (set_value("lanes", 1, 0), "two rows"),
        (set_value("lanes", 1, PADDING), "lane out of range"),
        (set_value("lanes", 5, 0), "padding rows name"),
        (set_value("num_logprobs", 5, 1), "padding rows want"),
        (set_value("start_positions", 2, 1), "consecutive"),
        (set_value("positions", 9, 3), "consecutive"),
        (set_value("context_starts", 3, 8), "before its context"),
        (set_value("context_starts", 3, -8), "before its context"),
        (set_value("context_starts", 7, -8), "before its context"),
        (set_value("tokens", 8, NO_TOKEN), "takes it from its lane"),
        (set_value("tokens", 8, -2), "negative"),
        (set_value("sample_tokens", 2, 5), "draws after its last token"),
        (set_value("sample_tokens", 6, 0), "padding rows draw"),
        (set_value("targets", 31, 5), "padding has no target"),
        (set_value("targets", 0, 5), "nobody asked"),
        (set_group_value("slots", 31, 0), "padding writes nothing"),
        (set_group_value("slots", 0, -1), "outside the arena"),
        (set_group_value("slots", 0, NO_SLOT - 1), "outside the arena"),
        (repeat_slot, "two tokens in one slot"),
        (set_group_value("table_updates", (0, 0), PADDING + 1), "no lane"),
        (set_group_value("table_updates", (0, 1), 4), "no column"),
        (repeat_update, "two updates"),
    ],
)
def test_a_broken_rule_is_noticed(mixed: tuple[Engine, StepBatch], breakage: Breakage, rule: str) -> None:
    engine, batch = mixed
    check(batch, engine.cache.layout, NUM_LANES)
    breakage(batch.fields)
    with pytest.raises(AssertionError, match=rule):
        check(batch, engine.cache.layout, NUM_LANES)


def test_a_long_row_in_a_decode_bucket_is_noticed() -> None:
    engine = fake_engine(CONFIG)
    for name in "abc":
        add(engine, name, [1])
    batch = next_batch(engine)
    batch.fields.num_rows[0] = batch.fields.num_decode_rows[0] = 2
    batch.fields.query_starts[:] = [0, 1, 3, 3, 3]
    batch.fields.num_decode_rows[0] = 1
    with pytest.raises(AssertionError, match="decode bucket"):
        check(batch, engine.cache.layout, NUM_LANES)
