"""The border: a plan becomes two flat buffers, the only thing that crosses from host to device in a step.

Owns: filling the buffers, and the rules they obey (``check``). Must never: import jax, decide who runs, or loop over
tokens. Block tables are read here and nowhere earlier, after the last block has moved.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from hkv_jax.engine.batch_format import NO_TOKEN, BatchFormat, StepFields
from hkv_jax.engine.buckets import Buckets
from hkv_jax.engine.lanes import Lanes
from hkv_jax.engine.plan import Chunk, StepPlan
from hkv_jax.kvcache.format import NO_SLOT
from hkv_jax.kvcache.manager import CacheManager


@dataclasses.dataclass(frozen=True, slots=True)
class StepBatch:
    """One step, ready to be sent.

    ints i32[format.num_ints] and floats f32[format.num_floats] are written once and never reused: a transfer may still
    be reading them. ``fields`` are views of them. The two flags say what of the result anyone will read.
    """

    format: BatchFormat
    ints: NDArray[np.int32]
    floats: NDArray[np.float32]
    fields: StepFields
    wants_logprobs: bool
    wants_prompt_logprobs: bool


def build(plan: StepPlan, cache: CacheManager, lanes: Lanes, buckets: Buckets) -> StepBatch:
    """Fills the buffers of the smallest of ``buckets`` that holds a plan.

    Takes the pending table updates from ``cache``: every plan must be built exactly once, in the order of planning.
    """
    batch_format = buckets.choose(plan, cache.num_table_updates())
    ints = np.zeros(batch_format.num_ints, np.int32)
    floats = np.zeros(batch_format.num_floats, np.float32)
    fields = batch_format.unpack(ints, floats)
    row_lanes = _row_lanes(plan)
    _fill_decode_rows(fields, plan, cache)
    row_ends = _fill_chunks(fields, plan, cache)
    _fill_rows(fields, plan, row_lanes, row_ends, lanes)
    _fill_sampling(fields, row_lanes, row_ends, lanes)
    floats.reshape(len(lanes.floats), -1)[:, : len(row_lanes)] = lanes.floats[:, row_lanes]
    _pad_sampling(fields, len(row_lanes))
    _fill_table_updates(fields, cache, lanes.num_lanes)
    return StepBatch(
        batch_format,
        ints,
        floats,
        fields,
        wants_logprobs=bool(lanes.num_logprobs[row_lanes].any()),
        wants_prompt_logprobs=bool(fields.num_prompt_logprobs.any()),
    )


def _row_lanes(plan: StepPlan) -> NDArray[np.int32]:
    if not plan.chunks:
        return plan.decode.lanes
    return np.concatenate((plan.decode.lanes, np.array([chunk.sequence.lane for chunk in plan.chunks], np.int32)))


def _fill_decode_rows(fields: StepFields, plan: StepPlan, cache: CacheManager) -> None:
    """Tokens, positions and slots of the rows whose token the lane knows."""
    decode = plan.decode
    count = len(decode.lanes)
    fields.tokens[:count] = NO_TOKEN
    fields.positions[:count] = decode.positions
    for group, slots in enumerate(fields.slots):
        slots[count:] = NO_SLOT
        slots[:count] = cache.decode_slots(group, decode.lanes, decode.positions)


def _fill_chunks(fields: StepFields, plan: StepPlan, cache: CacheManager) -> NDArray[np.int32]:
    """Tokens, positions, targets and slots of the chunks; returns the end position of every row, i32[num rows]."""
    fields.targets[:] = NO_TOKEN
    row = offset = len(plan.decode.lanes)
    ends = np.empty(plan.num_rows, np.int32)
    ends[:row] = plan.decode.positions + 1
    for chunk in plan.chunks:
        stop = offset + chunk.num_tokens
        fields.tokens[offset:stop] = chunk.sequence.tokens(chunk.start, chunk.end)
        fields.positions[offset:stop] = np.arange(chunk.start, chunk.end)
        for group, slots in enumerate(fields.slots):
            slots[offset:stop] = cache.write_slots(group, chunk.sequence.lane, chunk.start, chunk.end)
        if chunk.wants_prompt_logprobs:
            _fill_targets(fields, chunk, row, offset)
        ends[row] = chunk.end
        row, offset = row + 1, stop
    return ends


def _fill_targets(fields: StepFields, chunk: Chunk, row: int, offset: int) -> None:
    """The prompt token after each token of the chunk; the prompt's last token has none."""
    request = chunk.sequence.request
    following = request.prompt[chunk.start + 1 : chunk.end + 1]
    fields.targets[offset : offset + len(following)] = following
    assert request.params.prompt_logprobs is not None
    fields.num_prompt_logprobs[row] = request.params.prompt_logprobs + 1


def _fill_rows(
    fields: StepFields, plan: StepPlan, row_lanes: NDArray[np.int32], row_ends: NDArray[np.int32], lanes: Lanes
) -> None:
    """Where each row begins in the step and in its sequence, whose it is, and which of its tokens draws."""
    num_rows, num_decodes = len(row_lanes), len(plan.decode.lanes)
    lengths = [chunk.num_tokens for chunk in plan.chunks]
    starts = fields.query_starts
    starts[: num_decodes + 1] = np.arange(num_decodes + 1)
    starts[num_decodes + 1 : num_rows + 1] = num_decodes + np.cumsum(lengths, dtype=np.int32)
    starts[num_rows + 1 :] = plan.num_tokens
    fields.start_positions[:num_rows] = row_ends - np.diff(starts[: num_rows + 1])
    fields.context_starts[:num_rows] = lanes.context_starts[row_lanes]
    fields.prompt_lens[:num_rows] = lanes.prompt_lens[row_lanes]
    fields.lanes[:num_rows] = row_lanes
    fields.lanes[num_rows:] = lanes.num_lanes
    fields.num_rows[0] = num_rows
    fields.num_decode_rows[0] = num_decodes + lengths.count(1)
    fields.sample_tokens[:num_rows] = starts[1 : num_rows + 1] - 1
    fields.sample_tokens[num_rows:] = NO_TOKEN
    for row, chunk in enumerate(plan.chunks, num_decodes):
        if not chunk.samples:
            fields.sample_tokens[row] = NO_TOKEN


def _fill_sampling(fields: StepFields, row_lanes: NDArray[np.int32], row_ends: NDArray[np.int32], lanes: Lanes) -> None:
    """What the draw of each row depends on; a draw is a function of (seed, sample, output position) alone."""
    count = len(row_lanes)
    output_positions = np.maximum(row_ends - fields.prompt_lens[:count], 0)
    fields.seeds[:count] = lanes.seeds[row_lanes]
    fields.samples[:count] = lanes.samples[row_lanes]
    fields.output_positions[:count] = output_positions
    fields.suppress_stops[:count] = output_positions < lanes.min_tokens[row_lanes]
    fields.num_logprobs[:count] = lanes.num_logprobs[row_lanes]
    fields.top_k[:count] = lanes.top_k[row_lanes]


def _pad_sampling(fields: StepFields, num_rows: int) -> None:
    """Padding rows are greedy and unpenalised, so that they never ask for a costlier draw than the live ones."""
    fields.top_p[num_rows:] = 1.0
    fields.repetition_penalty[num_rows:] = 1.0


def _fill_table_updates(fields: StepFields, cache: CacheManager, num_lanes: int) -> None:
    for group, updates in enumerate(fields.table_updates):
        pending = cache.take_table_updates(group)
        updates[: len(pending)] = pending
        updates[len(pending) :, 0] = num_lanes
