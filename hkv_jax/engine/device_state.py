"""Everything the device keeps from step to step: donated to every program, so that each has exactly one owner.

Owns: the fields, their shapes and shardings, and the programs that change them between steps: blocks copied, table rows
installed, a lane set up, told of the tokens that never ran in it, or made to take over another's state. Must never: be
read by the host (sampled tokens are outputs of a step).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from hkv_jax.kvcache.format import NO_SLOT
from hkv_jax.kvcache.layout import KVLayout
from hkv_jax.model.kv_arena import ArenaArray, arena_shapes, copy_blocks
from hkv_jax.sampling_params import MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS
from hkv_jax.sharding import OVER_CHIPS, REPLICATED, named, vocabulary_partition

MAX_MASKED_STOPS = MAX_STOP_TOKEN_IDS + 32
"""Stop ids min_tokens can mask: the request's own and the model's."""

FORKS_A_CALL = 8

TABLE_ROWS_A_CALL = 4

COPIES_A_CALL = 64

PREFIX_TOKENS_A_CALL = 1024


class DeviceState(NamedTuple):
    """Donated state; Z lanes.

    arenas. tables: i32[Z, M] a group. last_tokens i32[Z]: drawn last. counts i32[Z, V]: output tokens seen; in_prompt
    bool[Z, V]. bias_ids i32[Z, B], bias_values f32[Z, B], stop_ids i32[Z, C]; ids one past the vocabulary are no entry.
    """

    arenas: tuple[Any, ...]
    tables: tuple[Any, ...]
    last_tokens: Any
    counts: Any
    in_prompt: Any
    bias_ids: Any
    bias_values: Any
    stop_ids: Any


class LaneSetup(NamedTuple):
    """What a sequence brings to its lane: lane i32[], bias_ids i32[B], bias_values f32[B], stop_ids i32[C]."""

    lane: Any
    bias_ids: Any
    bias_values: Any
    stop_ids: Any


class ForkCopies(NamedTuple):
    """A few forks at once.

    Lanes i32[FORKS_A_CALL] each (target past the last lane: none); pages i32[groups, FORKS_A_CALL] each (target
    NO_SLOT: nothing to copy).
    """

    source_lanes: Any
    target_lanes: Any
    source_pages: Any
    target_pages: Any


class BlockCopies(NamedTuple):
    """Blocks copied inside each group, those of the first group first; i32[groups, COPIES_A_CALL] pages of layer 0.

    Target NO_SLOT: nothing to copy.
    """

    source_pages: Any
    target_pages: Any


class TableRows(NamedTuple):
    """Whole table rows of a few lanes: lanes i32[TABLE_ROWS_A_CALL] (past the last: none), rows i32[.., M] a group."""

    lanes: Any
    rows: tuple[Any, ...]


class PrefixTokens(NamedTuple):
    """Tokens that a lane's sequence has and that never run in the lane.

    lane i32[]; empty bool[]: whether they are the first ones, so that what an earlier sequence left goes; prompt_tokens
    and output_tokens i32[PREFIX_TOKENS_A_CALL], padded with ids past the vocabulary.
    """

    lane: Any
    empty: Any
    prompt_tokens: Any
    output_tokens: Any


def state_shapes(layout: KVLayout, mesh: Mesh, num_lanes: int, vocab_size: int, arena_dtype: jnp.dtype) -> DeviceState:
    """Shape, dtype and sharding of every array of the state before it exists."""

    def replicated(shape: tuple[int, ...], dtype: type) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named(mesh, REPLICATED))

    def of_vocabulary(dtype: type) -> jax.ShapeDtypeStruct:
        sharding = named(mesh, vocabulary_partition(vocab_size, mesh))
        return jax.ShapeDtypeStruct((num_lanes, vocab_size), dtype, sharding=sharding)

    return DeviceState(
        arenas=arena_shapes(layout, mesh, arena_dtype),
        tables=tuple(replicated((num_lanes, group.table_width), jnp.int32) for group in layout.groups),
        last_tokens=replicated((num_lanes,), jnp.int32),
        counts=of_vocabulary(jnp.int32),
        in_prompt=of_vocabulary(jnp.bool_),
        bias_ids=replicated((num_lanes, MAX_LOGIT_BIASES), jnp.int32),
        bias_values=replicated((num_lanes, MAX_LOGIT_BIASES), jnp.float32),
        stop_ids=replicated((num_lanes, MAX_MASKED_STOPS), jnp.int32),
    )


def allocate_state(shapes: DeviceState, vocab_size: int) -> DeviceState:
    """A state of zeros, with no bias and no masked stop in any lane, allocated where it will stay."""

    def zeros() -> DeviceState:
        state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return state._replace(
            bias_ids=jnp.full_like(state.bias_ids, vocab_size), stop_ids=jnp.full_like(state.stop_ids, vocab_size)
        )

    return jax.jit(zeros, out_shardings=jax.tree.map(lambda s: s.sharding, shapes))()


def set_up_lane(state: DeviceState, setup: LaneSetup) -> DeviceState:
    """Installs a sequence's biases and masked stops in its lane."""
    return state._replace(
        bias_ids=state.bias_ids.at[setup.lane].set(setup.bias_ids, mode="drop"),
        bias_values=state.bias_values.at[setup.lane].set(setup.bias_values, mode="drop"),
        stop_ids=state.stop_ids.at[setup.lane].set(setup.stop_ids, mode="drop"),
    )


def fork_lanes(state: DeviceState, forks: ForkCopies, layout: KVLayout, mesh: Mesh) -> DeviceState:
    """Target lanes take over tables, counts and biases of their sources; partial blocks are copied page by page."""

    def take_over(rows: jax.Array) -> jax.Array:
        return rows.at[forks.target_lanes].set(rows[forks.source_lanes], mode="drop")

    arenas = _copied(state.arenas, BlockCopies(forks.source_pages, forks.target_pages), layout, mesh)
    # The copied block's entry changes here and not with the step's updates, which come too late for a sliding table.
    tables = tuple(
        table.at[forks.target_lanes].set(_row_after_copy(table[forks.source_lanes], sources, targets), mode="drop")
        for table, sources, targets in zip(state.tables, forks.source_pages, forks.target_pages, strict=True)
    )
    lanes = {name: take_over(getattr(state, name)) for name in DeviceState._fields if name not in ("arenas", "tables")}
    return DeviceState(arenas=arenas, tables=tables, **lanes)


def _row_after_copy(rows: jax.Array, sources: jax.Array, targets: jax.Array) -> jax.Array:
    copied = (rows == sources[:, None]) & (targets[:, None] != NO_SLOT)
    return jnp.where(copied, targets[:, None], rows)


def copy_state_blocks(state: DeviceState, copies: BlockCopies, layout: KVLayout, mesh: Mesh) -> DeviceState:
    """Copies whole blocks; no table changes."""
    return state._replace(arenas=_copied(state.arenas, copies, layout, mesh))


def install_table_rows(state: DeviceState, installed: TableRows) -> DeviceState:
    """Replaces the table rows of lanes in every group."""
    tables = tuple(
        table.at[installed.lanes].set(rows, mode="drop")
        for table, rows in zip(state.tables, installed.rows, strict=True)
    )
    return state._replace(tables=tables)


def count_prefix(state: DeviceState, prefix: PrefixTokens) -> DeviceState:
    """Lets the penalties of a lane know tokens that are not run in it."""
    counts = jnp.where(prefix.empty, 0, state.counts[prefix.lane])
    in_prompt = jnp.where(prefix.empty, False, state.in_prompt[prefix.lane])
    return state._replace(
        counts=state.counts.at[prefix.lane].set(counts.at[prefix.output_tokens].add(1, mode="drop")),
        in_prompt=state.in_prompt.at[prefix.lane].set(in_prompt.at[prefix.prompt_tokens].set(True, mode="drop")),
    )


def _copied(arenas: tuple[Any, ...], copies: BlockCopies, layout: KVLayout, mesh: Mesh) -> tuple[Any, ...]:
    changed = list(arenas)
    for number, group in enumerate(layout.groups):

        def local(arena: ArenaArray, sources: jax.Array, targets: jax.Array, fmt=group.format) -> ArenaArray:  # type: ignore[no-untyped-def]
            return copy_blocks(arena, fmt, sources, targets)

        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(OVER_CHIPS, PartitionSpec(), PartitionSpec()),
            out_specs=OVER_CHIPS,
            check_vma=False,
        )
        changed[group.arena] = mapped(changed[group.arena], copies.source_pages[number], copies.target_pages[number])
    return tuple(changed)


def no_copies(num_groups: int) -> BlockCopies:
    """Entries that do nothing, as numpy arrays to be overwritten by live ones."""
    shape = (num_groups, COPIES_A_CALL)
    return BlockCopies(np.zeros(shape, np.int32), np.full(shape, NO_SLOT, np.int32))


def no_forks(num_groups: int, num_lanes: int) -> ForkCopies:
    """Entries that do nothing, as numpy arrays to be overwritten by live ones."""
    lanes = np.full(FORKS_A_CALL, num_lanes, np.int32)
    pages = np.full((num_groups, FORKS_A_CALL), NO_SLOT, np.int32)
    return ForkCopies(np.zeros(FORKS_A_CALL, np.int32), lanes, np.zeros_like(pages), pages)
