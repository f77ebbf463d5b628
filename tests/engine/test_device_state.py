"""What changes the state between steps: what is named changes, everything else stays as it was."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from hkv_jax.engine.device_state import (
    COPIES_A_CALL,
    FORKS_A_CALL,
    PREFIX_TOKENS_A_CALL,
    TABLE_ROWS_A_CALL,
    DeviceState,
    ForkCopies,
    LaneSetup,
    PrefixTokens,
    TableRows,
    allocate_state,
    copy_state_blocks,
    count_prefix,
    fork_lanes,
    install_table_rows,
    no_copies,
    no_forks,
    set_up_lane,
)
from hkv_jax.kvcache.format import NO_SLOT
from hkv_jax.sharding import make_mesh
from hkv_jax.testing.unbuilt_engine import UnbuiltEngine, hybrid_spec

LANES, VOCABULARY = 5, 96


def unbuilt(chips: int = 1) -> UnbuiltEngine:
    mesh = make_mesh(chips)
    return UnbuiltEngine(hybrid_spec(3), mesh, jnp.dtype(jnp.float32), 1 << 18, max_num_seqs=LANES)


def random_state(engine: UnbuiltEngine) -> DeviceState:
    """Every array full of different numbers."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jax.device_put(jnp.asarray(rng.integers(0, 1000, s.shape), s.dtype), s.sharding), engine.state
    )


def as_numpy(state: DeviceState) -> dict[str, list[NDArray]]:
    return {name: [np.array(x) for x in jax.tree.leaves(field)] for name, field in state._asdict().items()}


def assert_equal(found: DeviceState, expected: dict[str, list[NDArray]]) -> None:
    for name, arrays in as_numpy(found).items():
        for array, wanted in zip(arrays, expected[name], strict=True):
            np.testing.assert_array_equal(array, wanted, err_msg=name)


def test_a_new_state_holds_nothing() -> None:
    engine = unbuilt()
    state = allocate_state(engine.state, VOCABULARY)
    assert (np.asarray(state.bias_ids) == VOCABULARY).all()
    assert (np.asarray(state.stop_ids) == VOCABULARY).all()
    rest = state._replace(bias_ids=jnp.zeros(1), stop_ids=jnp.zeros(1))
    assert not any(np.asarray(array).any() for array in jax.tree.leaves(rest))
    for array, shape in zip(jax.tree.leaves(state), jax.tree.leaves(engine.state), strict=True):
        assert (array.shape, array.dtype, array.sharding) == (shape.shape, shape.dtype, shape.sharding)


def test_a_set_up_changes_its_lane_only() -> None:
    state = random_state(unbuilt())
    expected = as_numpy(state)
    lane, (biases, stops) = 3, (state.bias_ids.shape[1], state.stop_ids.shape[1])
    setup = LaneSetup(
        jnp.int32(lane), jnp.arange(biases), jnp.linspace(-9, 9, biases, dtype=jnp.float32), jnp.arange(stops) + 5
    )
    for name in ("bias_ids", "bias_values", "stop_ids"):
        expected[name][0][lane] = np.asarray(getattr(setup, name))
    assert_equal(jax.jit(set_up_lane)(state, setup), expected)


PER_LANE = ("last_tokens", "counts", "in_prompt", "bias_ids", "bias_values", "stop_ids")


def forks(engine: UnbuiltEngine, entries: list[tuple[int, int, dict[int, tuple[int, int]]]]) -> ForkCopies:
    """Entries of (source lane, target lane, {group: (source page, target page)})."""
    copies = no_forks(len(engine.layout.groups), LANES)
    for place, (source, target, pages) in enumerate(entries):
        copies.source_lanes[place], copies.target_lanes[place] = source, target
        for group, (source_page, target_page) in pages.items():
            copies.source_pages[group, place] = source_page
            copies.target_pages[group, place] = target_page
    return copies


@pytest.mark.parametrize("chips", [1, 2])
def test_a_fork_takes_over_the_lane_and_copies_the_partial_blocks(chips: int) -> None:
    engine = unbuilt(chips)
    layout, state = engine.layout, random_state(engine)
    expected = as_numpy(state)
    # Groups share the arena, so their blocks are taken from different slabs.
    first, second = layout.groups
    assert first.arena == second.arena == 0
    pages = {
        0: (
            first.page(first.initial_slabs[0] * first.blocks_per_slab),
            first.page(first.initial_slabs[1] * first.blocks_per_slab),
        ),
        1: (
            second.page(second.initial_slabs[0] * second.blocks_per_slab),
            second.page(second.initial_slabs[1] * second.blocks_per_slab),
        ),
    }
    source, targets = 4, (0, 2)
    for group, (source_page, _) in pages.items():
        expected["tables"][group][source, 1] = source_page
    state = state._replace(tables=tuple(jnp.asarray(table) for table in expected["tables"]))
    entries = [(source, targets[0], pages), (source, targets[1], {})]
    for name in PER_LANE:
        expected[name][0][list(targets)] = expected[name][0][source]
    for group, (source_page, target_page) in pages.items():
        table = expected["tables"][group]
        table[list(targets)] = table[source]
        table[targets[0], table[source] == source_page] = target_page
        fmt = layout.groups[group].format
        block = expected["arenas"][0].reshape(chips, -1, fmt.page_elements)
        block[:, target_page : target_page + fmt.num_layers] = block[:, source_page : source_page + fmt.num_layers]
    program = jax.jit(lambda state, copies: fork_lanes(state, copies, layout, engine.mesh))
    assert_equal(program(state, forks(engine, entries)), expected)


def test_entries_that_are_not_used_do_nothing() -> None:
    engine = unbuilt()
    state = random_state(engine)
    copies = no_forks(2, LANES)
    assert (copies.target_lanes == LANES).all() and (copies.target_pages == NO_SLOT).all()
    assert copies.source_lanes.shape == (FORKS_A_CALL,)
    program = jax.jit(lambda state, copies: fork_lanes(state, copies, engine.layout, engine.mesh))
    assert_equal(program(state, copies), as_numpy(state))


@pytest.mark.parametrize("chips", [1, 2])
def test_blocks_are_copied_in_order_inside_their_groups(chips: int) -> None:
    engine = unbuilt(chips)
    layout, state = engine.layout, random_state(engine)
    expected = as_numpy(state)
    copies, program = no_copies(2), jax.jit(lambda state, made: copy_state_blocks(state, made, layout, engine.mesh))
    # Places need not be in order, and a block may take the place that another has just left.
    for group, place, source, target in ((0, 3, 2, 5), (0, 7, 1, 2), (1, 0, 0, 2), (1, 63, 4, 0)):
        cache = layout.groups[group]
        first = cache.initial_slabs[0] * cache.blocks_per_slab
        pages = [cache.page(first + block) for block in (source, target)]
        copies.source_pages[group, place], copies.target_pages[group, place] = pages
        block = expected["arenas"][0].reshape(chips, -1, cache.format.page_elements)
        layers = np.arange(cache.format.num_layers)
        block[:, pages[1] + layers] = block[:, pages[0] + layers]
    assert_equal(program(state, copies), expected)
    assert_equal(program(random_state(engine), no_copies(2)), as_numpy(random_state(engine)))
    assert copies.source_pages.shape == (2, COPIES_A_CALL)


def test_whole_table_rows_are_installed() -> None:
    state = random_state(unbuilt())
    expected = as_numpy(state)
    lanes = np.array([3, LANES, 0, LANES], np.int32)
    rows = tuple(np.arange(TABLE_ROWS_A_CALL * t.shape[1]).reshape(-1, t.shape[1]) - 7 for t in state.tables)
    for table, row in zip(expected["tables"], rows, strict=True):
        table[[3, 0]] = row[[0, 2]]
    assert_equal(jax.jit(install_table_rows)(state, TableRows(lanes, rows)), expected)


@pytest.mark.parametrize("empty", [True, False])
def test_a_prefix_that_is_not_run_is_counted(empty: bool) -> None:
    state = random_state(unbuilt())
    expected = as_numpy(state)
    prompt, outputs = (np.full(PREFIX_TOKENS_A_CALL, VOCABULARY, np.int32) for _ in range(2))
    prompt[:3], outputs[5:9] = (7, 9, 7), (1, 95, 1, 7)
    counts, in_prompt = expected["counts"][0][2], expected["in_prompt"][0][2]
    if empty:
        counts[:], in_prompt[:] = 0, False
    np.add.at(counts, outputs[5:9], 1)
    in_prompt[[7, 9]] = True
    prefix = PrefixTokens(np.int32(2), np.bool_(empty), prompt, outputs)
    assert_equal(jax.jit(count_prefix)(state, prefix), expected)
