"""The rules of the border, asserted on a filled batch: for tests and the runner that stands in for a device.

Owns: what must hold of a batch whatever made it. Must never: import jax, or change a batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hkv_jax.engine.batch import StepBatch
from hkv_jax.engine.batch_format import NO_TOKEN, StepFields
from hkv_jax.kvcache.format import NO_SLOT
from hkv_jax.kvcache.layout import KVLayout


def check(batch: StepBatch, layout: KVLayout, num_lanes: int) -> None:
    """Asserts that ``batch`` is one the device may run, for a cache of ``layout`` and ``num_lanes`` lanes."""
    fields = batch.fields
    _check_rows(batch, num_lanes)
    _check_contexts(fields, layout)
    _check_tokens(batch)
    _check_slots(fields, layout)
    _check_table_updates(fields, layout, num_lanes)


def _check_rows(batch: StepBatch, num_lanes: int) -> None:
    fields, bucket = batch.fields, batch.format.bucket
    num_rows, num_decodes = int(fields.num_rows[0]), int(fields.num_decode_rows[0])
    lengths = np.diff(fields.query_starts)
    assert 1 <= num_rows <= bucket.num_rows, "S3: rows"
    assert fields.query_starts[0] == 0, "the first row begins at token 0"
    assert (lengths[:num_rows] >= 1).all(), "a live row has no token"
    assert (lengths[num_rows:] == 0).all(), "query_starts is padded with its last value"
    assert fields.query_starts[-1] <= bucket.num_tokens, "S3: tokens"
    assert (lengths[:num_decodes] == 1).all(), "decode rows have one token"
    assert (lengths[num_decodes:num_rows] > 1).all(), "rows of one token come first"
    assert bucket.prefill or num_decodes == num_rows, "a decode bucket with a longer row"
    lanes = fields.lanes[:num_rows]
    assert ((lanes >= 0) & (lanes < num_lanes)).all(), "a lane out of range"
    assert _are_distinct(lanes), "a lane with two rows"
    assert (fields.lanes[num_rows:] == num_lanes).all(), "padding rows name the lane past the last"
    assert (fields.num_logprobs[num_rows:] == 0).all(), "padding rows want no logprobs"


def _check_contexts(fields: StepFields, layout: KVLayout) -> None:
    num_rows = int(fields.num_rows[0])
    contexts = fields.context_starts
    assert ((contexts >= 0) & (contexts <= fields.start_positions)).all(), "a row begins before its context"
    assert (contexts[num_rows:] == 0).all(), "padding rows have no context start"
    # Block sizes are powers of two, so the largest is a multiple of all.
    assert (contexts % layout.largest_block_size == 0).all(), "a context starts within a block"


def _check_tokens(batch: StepBatch) -> None:
    fields = batch.fields
    num_rows, num_tokens = int(fields.num_rows[0]), int(fields.query_starts[-1])
    starts = fields.query_starts[:num_rows]
    lengths = np.diff(fields.query_starts)[:num_rows]
    rows = np.repeat(np.arange(num_rows), lengths)
    expected = fields.start_positions[rows] + np.arange(num_tokens) - starts[rows]
    assert np.array_equal(fields.positions[:num_tokens], expected), "positions of a row are consecutive"
    from_lane = np.flatnonzero(fields.tokens[:num_tokens] == NO_TOKEN)
    assert (lengths[rows[from_lane]] == 1).all(), "only a row of one token takes it from its lane"
    assert (fields.tokens[:num_tokens] >= NO_TOKEN).all(), "a negative token"
    draws = fields.sample_tokens[:num_rows]
    assert ((draws == NO_TOKEN) | (draws == starts + lengths - 1)).all(), "a row draws after its last token"
    assert (fields.sample_tokens[num_rows:] == NO_TOKEN).all(), "padding rows draw nothing"
    if len(fields.targets):
        assert (fields.targets[num_tokens:] == NO_TOKEN).all(), "padding has no target"
        wanted = np.flatnonzero(fields.targets[:num_tokens] != NO_TOKEN)
        assert (fields.num_prompt_logprobs[rows[wanted]] > 0).all(), "a target that nobody asked for"


def _check_slots(fields: StepFields, layout: KVLayout) -> None:
    num_tokens = int(fields.query_starts[-1])
    for slots, group in zip(fields.slots, layout.groups, strict=True):
        assert (slots[num_tokens:] == NO_SLOT).all(), "padding writes nothing"
        written = slots[:num_tokens][slots[:num_tokens] != NO_SLOT]
        limit = layout.arenas[group.arena].num_slabs * group.pages_per_slab * group.format.block_size
        assert ((written >= 0) & (written < limit)).all(), "a slot outside the arena"
        assert _are_distinct(written), "T3: two tokens in one slot"


def _check_table_updates(fields: StepFields, layout: KVLayout, num_lanes: int) -> None:
    for updates, group in zip(fields.table_updates, layout.groups, strict=True):
        live = updates[updates[:, 0] != num_lanes]
        assert ((live[:, 0] >= 0) & (live[:, 0] < num_lanes)).all(), "a table update of no lane"
        assert ((live[:, 1] >= 0) & (live[:, 1] < group.table_width)).all(), "a table update of no column"
        assert _are_distinct(live[:, 0] * group.table_width + live[:, 1]), "two updates of one table entry"


def _are_distinct(values: NDArray[np.int32]) -> bool:
    # A step has few of anything: a set is several times faster than sorting them as np.unique does.
    return len(set(values.tolist())) == len(values)
