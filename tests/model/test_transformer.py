"""The two layer loops compute the same, and every layer has a place of its own in the cache."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from hkv_jax.kvcache.format import NO_SLOT
from hkv_jax.model.attention import GroupStep
from hkv_jax.model.kv_arena import ArenaArray
from hkv_jax.model.transformer import LayerPlace, ModelParameters, ModelStep, run_layers
from hkv_jax.model.xla_attention import StepRows
from hkv_jax.sharding import make_mesh
from hkv_jax.testing.unbuilt_engine import UnbuiltEngine, hybrid_spec

BLOCKS, CHUNK, NUM_CHUNKS = 3, 6, 3

Run = tuple[jax.Array, tuple[ArenaArray, ...]]


def unbuilt(num_layers: int, period: int = 2, chips: int = 1, scanned: bool = False) -> UnbuiltEngine:
    spec = hybrid_spec(num_layers, period, qk_norm=True, sandwich_norm=True)
    return UnbuiltEngine(spec, make_mesh(chips), jnp.dtype(jnp.float32), 1 << 19, scanned=scanned)


def random_parameters(engine: UnbuiltEngine) -> ModelParameters:
    rng = np.random.default_rng(0)
    shapes = dataclasses.replace(engine, scanned=False).parameters
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(scale=0.2, size=s.shape), s.dtype), shapes)


def stacked(parameters: ModelParameters, period: int) -> ModelParameters:
    """The same weights for a scan over whole periods; what is left over stays a layer of its own."""
    whole = len(parameters.layers) // period * period
    by_position = tuple(
        jax.tree.map(lambda *alike: jnp.stack(alike), *parameters.layers[position:whole:period])
        for position in range(period)
    )
    return ModelParameters(parameters.embedder, by_position, parameters.layers[whole:])


def run(engine: UnbuiltEngine, parameters: ModelParameters) -> Run:
    """A prompt in chunks; the hidden states of the last one, and the arenas."""
    groups = engine.layout.groups
    tables = [np.array([[group.page(b + 1) for b in range(BLOCKS)]], np.int32) for group in groups]
    attention = [dataclasses.replace(spec, table_width=BLOCKS) for spec in engine.attention]

    @jax.jit
    def step(parameters: ModelParameters, arenas: tuple[ArenaArray, ...], start: jax.Array) -> Run:
        positions = start + jnp.arange(CHUNK, dtype=jnp.int32)
        ends = jnp.array([0, CHUNK], jnp.int32)
        zero = jnp.int32(0)
        rows = StepRows(zero[None], start[None], zero[None], ends, jnp.int32(1), zero)
        steps = []
        for spec, table in zip(attention, tables, strict=True):
            block = spec.format.block_size
            slots = jnp.asarray(table)[0, positions // block] * block + positions % block
            steps.append(GroupStep(spec, jnp.asarray(table), slots, rows))
        tokens = (positions * 37 + 5) % 96
        return run_layers(engine.decoder, parameters, arenas, ModelStep(tokens, positions, tuple(steps), True))

    arenas = tuple(jnp.full(shape.shape, jnp.nan, shape.dtype) for shape in engine.state.arenas)
    for chunk in range(NUM_CHUNKS):
        hidden, arenas = step(parameters, arenas, jnp.int32(chunk * CHUNK))
    return hidden, arenas


@cache
def unrolled() -> tuple[UnbuiltEngine, ModelParameters, Run]:
    """Two periods of two sliding layers and a global one, and one layer more."""
    engine = unbuilt(7, period=3)
    parameters = random_parameters(engine)
    return engine, parameters, run(engine, parameters)


def test_a_scan_over_periods_is_the_unrolled_loop() -> None:
    engine, parameters, (hidden, arenas) = unrolled()
    scanning = unbuilt(7, period=3, scanned=True)
    assert scanning.decoder.num_scanned_periods == 2
    other_hidden, other_arenas = run(scanning, stacked(parameters, engine.spec.period))
    assert np.isfinite(hidden).all()
    np.testing.assert_allclose(hidden, other_hidden, atol=1e-4, rtol=1e-4)
    for arena, other in zip(arenas, other_arenas, strict=True):
        np.testing.assert_allclose(arena, other, atol=1e-4, rtol=1e-4)


def test_chips_share_the_work_and_change_nothing() -> None:
    engine = unbuilt(2)
    parameters = random_parameters(engine)
    hidden, _ = run(engine, parameters)
    sharded, _ = run(unbuilt(2, chips=2), parameters)
    np.testing.assert_allclose(hidden, sharded, atol=1e-4, rtol=1e-4)


def test_every_layer_writes_its_own_page_of_a_block() -> None:
    engine, _, (_, (arena,)) = unrolled()
    for group in engine.layout.groups:
        fmt = group.format
        block = np.asarray(arena).reshape(-1, fmt.page_elements)[group.page(1) : group.page(1) + fmt.num_layers]
        assert np.isfinite(block).all(), "a layer of the group wrote too little"
        assert len(np.unique(block, axis=0)) == fmt.num_layers, "two layers wrote the same"


def test_places_count_a_group_s_layers_in_order() -> None:
    # s s g s s g s s: the global group comes first, and a period has one global and two sliding layers.
    places = unbuilt(8, period=3).decoder.places()
    assert places == (
        LayerPlace(1, 0, 2),
        LayerPlace(1, 1, 2),
        LayerPlace(0, 0, 1),
        LayerPlace(1, 2, 2),
        LayerPlace(1, 3, 2),
        LayerPlace(0, 1, 1),
        LayerPlace(1, 4, 2),
        LayerPlace(1, 5, 2),
    )


def test_a_token_without_a_slot_leaves_the_arena_as_it_is() -> None:
    engine = unbuilt(2)
    zero = jnp.int32(0)
    rows = StepRows(zero[None], zero[None], zero[None], jnp.zeros(2, jnp.int32), zero, zero)
    steps = tuple(
        GroupStep(spec, jnp.zeros((1, BLOCKS), jnp.int32), jnp.full(1, NO_SLOT), rows)
        for spec in (dataclasses.replace(each, table_width=BLOCKS) for each in engine.attention)
    )
    arenas = tuple(jnp.full(shape.shape, 7.0, shape.dtype) for shape in engine.state.arenas)
    step = ModelStep(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), steps, False)
    hidden, after = jax.jit(lambda p, a: run_layers(engine.decoder, p, a, step))(random_parameters(engine), arenas)
    assert np.isfinite(hidden).all()
    for arena in after:
        assert (np.asarray(arena) == 7).all()
