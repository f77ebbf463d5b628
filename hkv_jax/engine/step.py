"""The one program of a bucket: cut the buffers, run the model, draw the next tokens.

Owns: the order of what happens in a step. Must never: decide anything the host could have decided.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hkv_jax.engine.batch_format import NO_TOKEN, BatchFormat, StepFields
from hkv_jax.engine.device_state import DeviceState
from hkv_jax.model.attention import GroupStep
from hkv_jax.model.logprobs import TopLogprobs, none_of, prompt_logprobs, top_logprobs
from hkv_jax.model.rows_over_chips import by_rows, over_vocabulary
from hkv_jax.model.sampling import LaneSampling, SamplingRows, sample, shape_logits
from hkv_jax.model.transformer import Decoder, ModelParameters, ModelStep, run_layers
from hkv_jax.model.xla_attention import AttentionSpec, StepRows

_Counted = tuple[jax.Array, jax.Array]
"""Of each lane, output tokens i32[Z, V] and whether the prompt has them bool[Z, V]."""


class StepOutputs(NamedTuple):
    """What a step brings back.

    tokens i32[S]: what each row drew (0 where it draws nothing). logprobs over [S]; prompt_logprobs over [T], or over
    [0] in decode buckets; both are zeros where no row asked.
    """

    tokens: jax.Array
    logprobs: TopLogprobs
    prompt_logprobs: TopLogprobs


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """What is static of a step: the decoder, each group's attention, and the buffers' format."""

    decoder: Decoder
    attention: tuple[AttentionSpec, ...]
    format: BatchFormat

    def __call__(
        self, parameters: ModelParameters, state: DeviceState, ints: jax.Array, floats: jax.Array
    ) -> tuple[DeviceState, StepOutputs]:
        """Runs one step; ints i32[num_ints] and floats f32[num_floats] are as ``engine.batch`` filled them."""
        fields = self.format.unpack(ints, floats)
        rows = StepRows(
            fields.lanes,
            fields.start_positions,
            fields.context_starts,
            fields.query_starts,
            fields.num_rows[0],
            fields.num_decode_rows[0],
        )
        row_of_token, live_token = _rows_of_tokens(fields)
        tokens = _input_tokens(fields, state.last_tokens, row_of_token)
        state = _count_tokens(state, fields, tokens, row_of_token, live_token)
        # A sliding table turns over as it is updated, so it is read first and updated at the end of the step.
        state = self._update_tables(state, fields, windowed=False)
        groups = tuple(
            self._group_step(GroupStep(spec, table, slots, rows), parameters)
            for spec, table, slots in zip(self.attention, state.tables, fields.slots, strict=True)
        )
        step = ModelStep(tokens, fields.positions, groups, self.format.bucket.prefill)
        hidden, arenas = run_layers(self.decoder, parameters, state.arenas, step)
        state = self._update_tables(state._replace(arenas=arenas), fields, windowed=True)
        return self._draw(parameters, state, fields, hidden)

    def _group_step(self, group: GroupStep, parameters: ModelParameters) -> GroupStep:
        num_heads, dim = self.decoder.spec.num_heads, group.spec.format.head_dim
        dtype = jax.tree.leaves(parameters.embedder)[0].dtype
        queries = jax.ShapeDtypeStruct((self.format.bucket.num_tokens, num_heads, dim), dtype)
        return group.prepared(self.decoder.mesh, queries, self.format.bucket.prefill)

    def _update_tables(self, state: DeviceState, fields: StepFields, windowed: bool) -> DeviceState:
        tables = [
            table.at[updates[:, 0], updates[:, 1]].set(updates[:, 2], mode="drop")
            if (spec.window is not None) == windowed
            else table
            for spec, table, updates in zip(self.attention, state.tables, fields.table_updates, strict=True)
        ]
        return state._replace(tables=tuple(tables))

    def _draw(
        self, parameters: ModelParameters, state: DeviceState, fields: StepFields, hidden: jax.Array
    ) -> tuple[DeviceState, StepOutputs]:
        embedder, mesh = self.decoder.embedder(parameters), self.decoder.mesh
        num_rows = self.format.bucket.num_rows

        def to_logits(hidden: jax.Array) -> jax.Array:
            return over_vocabulary(embedder.logits(hidden), mesh)

        def draw(hidden: jax.Array) -> tuple[jax.Array, TopLogprobs]:
            taken = hidden.at[jnp.maximum(fields.sample_tokens, 0)].get(mode="clip")
            logits = to_logits(taken)
            tokens = by_rows(mesh, sample, _shaped(logits, state, fields), _sampling_rows(fields))
            logprobs = lax.cond(
                jnp.any(fields.num_logprobs > 0),
                partial(by_rows, mesh, top_logprobs),
                lambda *_: none_of(num_rows),
                logits,
                tokens,
            )
            return tokens, logprobs

        def likely_tokens(hidden: jax.Array, targets: jax.Array) -> TopLogprobs:
            return by_rows(mesh, top_logprobs, to_logits(hidden), targets)

        # Chunks inside a prompt draw nothing: their step is spared the product with the whole vocabulary.
        nothing = (jnp.zeros(num_rows, jnp.int32), none_of(num_rows))
        wanted = fields.sample_tokens != NO_TOKEN
        tokens, logprobs = lax.cond(jnp.any(wanted), draw, lambda _: nothing, hidden)
        of_prompt = none_of(0)
        if self.format.bucket.prefill:
            of_prompt = lax.cond(
                jnp.any(fields.num_prompt_logprobs > 0),
                lambda h: prompt_logprobs(h, fields.targets, fields.query_starts[-1], likely_tokens),
                lambda h: none_of(h.shape[0]),
                hidden,
            )
        lanes = jnp.where(wanted, fields.lanes, state.last_tokens.shape[0])
        last_tokens = state.last_tokens.at[lanes].set(tokens, mode="drop")
        return state._replace(last_tokens=last_tokens), StepOutputs(tokens, logprobs, of_prompt)


def _rows_of_tokens(fields: StepFields) -> tuple[jax.Array, jax.Array]:
    """Row of each token i32[T] (padding: the last row) and whether it is live bool[T]."""
    index = jnp.arange(fields.tokens.shape[0], dtype=jnp.int32)
    row = jnp.searchsorted(fields.query_starts[1:], index, side="right").astype(jnp.int32)
    return jnp.minimum(row, fields.lanes.shape[0] - 1), index < fields.query_starts[-1]


def _input_tokens(fields: StepFields, last_tokens: jax.Array, row_of_token: jax.Array) -> jax.Array:
    drawn = last_tokens.at[fields.lanes[row_of_token]].get(mode="clip")
    return jnp.where(fields.tokens == NO_TOKEN, drawn, fields.tokens)


def _count_tokens(
    state: DeviceState, fields: StepFields, tokens: jax.Array, row_of_token: jax.Array, live_token: jax.Array
) -> DeviceState:
    """Counts the tokens of rows with penalties, after emptying the counts of lanes that start afresh."""
    num_lanes = state.counts.shape[0]
    penalised = _live_rows(fields) & _penalised(fields)
    fresh = penalised & (fields.start_positions == 0)
    fresh_first = jnp.argsort(~fresh)

    def empty(number: jax.Array, counted: _Counted) -> _Counted:
        lane = fields.lanes[fresh_first[number]]
        return tuple(lax.dynamic_update_slice_in_dim(c, jnp.zeros_like(c[:1]), lane, 0) for c in counted)  # type: ignore[return-value]

    def count(_: jax.Array, counted: _Counted) -> _Counted:
        # A loop over the few fresh lanes: a scatter of whole rows would make an array of zeros every step.
        counts, in_prompt = lax.fori_loop(0, jnp.sum(fresh), empty, counted)
        wanted = live_token & penalised[row_of_token]
        of_prompt = fields.positions < fields.prompt_lens[row_of_token]
        lanes = fields.lanes[row_of_token]
        counts = counts.at[jnp.where(wanted & ~of_prompt, lanes, num_lanes), tokens].add(1, mode="drop")
        in_prompt = in_prompt.at[jnp.where(wanted & of_prompt, lanes, num_lanes), tokens].set(True, mode="drop")
        return counts, in_prompt

    # A loop of one turn or none: what a conditional is given would be copied, and most steps have no penalties.
    turns = jnp.any(penalised).astype(jnp.int32)
    counts, in_prompt = lax.fori_loop(0, turns, count, (state.counts, state.in_prompt))
    return state._replace(counts=counts, in_prompt=in_prompt)


def _live_rows(fields: StepFields) -> jax.Array:
    return jnp.arange(fields.lanes.shape[0], dtype=jnp.int32) < fields.num_rows[0]


def _penalised(fields: StepFields) -> jax.Array:
    return (fields.repetition_penalty != 1) | (fields.presence_penalty != 0) | (fields.frequency_penalty != 0)


def _sampling_rows(fields: StepFields) -> SamplingRows:
    return SamplingRows(*(getattr(fields, name) for name in SamplingRows._fields))


def _shaped(logits: jax.Array, state: DeviceState, fields: StepFields) -> jax.Array:
    """The logits with biases, penalties and masks, where any row has one."""

    def of_rows(per_lane: jax.Array) -> jax.Array:
        return per_lane.at[fields.lanes].get(mode="clip")

    biased = of_rows(state.bias_ids[:, 0]) < logits.shape[1]
    needed = _live_rows(fields) & (biased | _penalised(fields) | (fields.suppress_stops > 0))

    def shape(logits: jax.Array) -> jax.Array:
        lanes = LaneSampling(*(of_rows(getattr(state, name)) for name in LaneSampling._fields))
        return shape_logits(logits, _sampling_rows(fields), lanes)

    return lax.cond(jnp.any(needed), shape, lambda logits: logits, logits)
