"""The hybrid decoder: (parameters, arenas, step) → (hidden states, arenas), one layer body and two loops.

Owns: the order of layers and which arena, table and page each of them uses. The loop over layers is the platform's
business: a ``lax.scan`` over the model's repeating period with stacked weights (TPU: compile time does not depend on
depth), or an unrolled loop with one array a layer (CPU: a scan copies every slice). Must never: know a model family
or a request.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from hkv_jax.array_types import Hidden, Parameters
from hkv_jax.model.attention import GroupStep, LayerArrays, write_and_attend
from hkv_jax.model.kv_arena import ArenaArray
from hkv_jax.model.layers import DecoderLayer, Embedder, bind
from hkv_jax.model.rope import rope_angles
from hkv_jax.spec import ModelSpec, RopeSpec


class ModelParameters(NamedTuple):
    """All parameters of a model, flat.

    ``embedder``: those outside the layers. ``stacked``: one dict for each position of the layer period, arrays
    [periods, …]; empty where the loop is unrolled. ``layers``: one dict a layer that is not in ``stacked``.
    """

    embedder: Parameters
    stacked: tuple[Parameters, ...]
    layers: tuple[Parameters, ...]


@dataclasses.dataclass(frozen=True)
class LayerPlace:
    """Where a layer keeps its K/V: group, index in it, and how many of the group's layers a period holds."""

    group: int
    index: int
    period_stride: int


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What is static of a model on a mesh.

    ``arena_of_group`` names each group's arena; ``num_scanned_periods`` is 0 where the layer loop is unrolled.
    """

    spec: ModelSpec
    mesh: Mesh
    kv_heads: tuple[int, ...]
    arena_of_group: tuple[int, ...]
    num_scanned_periods: int

    @property
    def platform(self) -> str:
        """Where it will run: ``cpu``, ``gpu`` or ``tpu``; a mesh may describe devices this machine does not have."""
        return str(self.mesh.devices.flat[0].platform)

    def layer_module(self, layer: int) -> DecoderLayer:
        """The module of a layer, for its structure."""
        return DecoderLayer(self.spec, self.spec.layers[layer], self.kv_heads[layer], self.platform)

    def embedder_module(self) -> Embedder:
        """The module of what lies outside the layers."""
        return Embedder(self.spec, self.platform)

    def embedder(self, parameters: ModelParameters) -> Embedder:
        """The embedder with its parameters, for use inside a trace."""
        return bind(self.embedder_module, parameters.embedder)

    def places(self) -> tuple[LayerPlace, ...]:
        """Each layer's place, by layer."""
        places: dict[int, LayerPlace] = {}
        for number, group in enumerate(self.spec.kv_groups()):
            stride = sum(layer < self.spec.period for layer in group.layers)
            for index, layer in enumerate(group.layers):
                places[layer] = LayerPlace(number, index, stride)
        return tuple(places[layer] for layer in range(self.spec.num_layers))


@dataclasses.dataclass(frozen=True)
class ModelStep:
    """One step's arrays that all layers share: tokens and positions i32[T]; groups in the order of the spec."""

    tokens: jax.Array
    positions: jax.Array
    groups: tuple[GroupStep, ...]
    has_prefill: bool


def run_layers(
    decoder: Decoder, parameters: ModelParameters, arenas: tuple[ArenaArray, ...], step: ModelStep
) -> tuple[Hidden, tuple[ArenaArray, ...]]:
    """Embeds the step's tokens and runs every layer.

    Returns:
        hidden states [T, E] before the final norm, and the arenas with the step's K/V written.
    """
    places = decoder.places()
    angles = _angles(decoder.spec, step.positions)
    x = decoder.embedder(parameters).embed(step.tokens)
    period, scanned = decoder.spec.period, decoder.num_scanned_periods

    def body(
        position: int,
        layer_in_group: jax.Array | int,
        weights: Parameters,
        carry: tuple[Hidden, tuple[ArenaArray, ...]],
    ) -> tuple[Hidden, tuple[ArenaArray, ...]]:
        x, arenas = carry
        place, layer = places[position], decoder.spec.layers[position]
        which = decoder.arena_of_group[place.group]
        written = arenas[which]

        def attend(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
            nonlocal written
            own = LayerArrays(layer_in_group, queries, keys, values)
            output, written = write_and_attend(
                decoder.mesh, step.groups[place.group], own, arenas[which], step.has_prefill
            )
            return output

        x = bind(partial(decoder.layer_module, position), weights)(x, angles[layer.rope, layer.head_dim], attend)
        return x, tuple(written if number == which else arena for number, arena in enumerate(arenas))

    def one_period(
        carry: tuple[Hidden, tuple[ArenaArray, ...]], sliced: tuple[jax.Array, tuple[Parameters, ...]]
    ) -> tuple[tuple[Hidden, tuple[ArenaArray, ...]], None]:
        number, weights = sliced
        for position in range(period):
            place = places[position]
            carry = body(position, place.index + number * place.period_stride, weights[position], carry)
        return carry, None

    carry = (x, arenas)
    if scanned:
        carry, _ = lax.scan(one_period, carry, (jnp.arange(scanned, dtype=jnp.int32), parameters.stacked))
    for position, weights in enumerate(parameters.layers, start=scanned * period):
        carry = body(position, places[position].index, weights, carry)
    return carry


def _angles(spec: ModelSpec, positions: jax.Array) -> dict[tuple[RopeSpec, int], tuple[jax.Array, jax.Array]]:
    kinds = {(layer.rope, layer.head_dim) for layer in spec.layers}
    return {(rope, dim): rope_angles(rope, dim, positions) for rope, dim in sorted(kinds, key=repr)}
