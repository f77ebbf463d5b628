"""A model's parameters on the device, flat, in the form the platform's layer loop wants.

Owns: which arrays there are (from the modules' structure), their dtypes and shardings, and filling them from a
checkpoint. Norm weights keep the compute dtype like everything else. Must never: keep a second copy of the weights,
on host or device, for longer than one parameter takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp

from hkv_jax.array_types import Parameters
from hkv_jax.families.tensor_names import TensorNames
from hkv_jax.model.checkpoint import Checkpoint, HeadRepeat
from hkv_jax.model.layers import abstract_parameters
from hkv_jax.model.transformer import Decoder, ModelParameters
from hkv_jax.sharding import named, parameter_partition

Progress = Callable[[str, int, int], None]
"""Told what was just done, how many things are done, and how many there are."""

_KV_PARAMETERS = ("k", "v", "k_bias", "v_bias")


def parameter_shapes(decoder: Decoder, dtype: jnp.dtype) -> ModelParameters:
    """Shape, dtype and sharding of every parameter before it exists."""
    return _assemble(decoder, lambda _, names: _shapes_of(decoder, names, dtype), _stacked_shape)


def load_parameters(
    decoder: Decoder, checkpoint: Checkpoint, names: TensorNames, dtype: jnp.dtype, progress: Progress
) -> ModelParameters:
    """Reads a checkpoint straight into sharded arrays; ``progress`` is told of each layer.

    Raises:
        CheckpointError: a tensor is missing, misshapen, unexpected or truncated.
    """
    checkpoint.check(_expected(decoder, names), names.is_ignored)
    if names.tied_head is not None:
        checkpoint.check_copy(names.tied_head, names.outside_layers()["embedding"])

    def fill(layer: int | None, shapes: dict[str, tuple[int, ...]]) -> Parameters:
        tensors = names.outside_layers() if layer is None else names.of_layer(layer)
        arrays = {}
        for name, shape in shapes.items():
            sharding = named(decoder.mesh, parameter_partition(name, shape, decoder.mesh))
            arrays[name] = checkpoint.load(tensors[name], sharding, dtype, _repeat(decoder, layer, name))
        progress(
            "loaded embedding" if layer is None else f"loaded layer {layer}",
            0 if layer is None else layer + 1,
            decoder.spec.num_layers,
        )
        return arrays

    return _assemble(decoder, fill, _stack)


def _assemble(
    decoder: Decoder,
    fill: Callable[[int | None, dict[str, tuple[int, ...]]], Parameters],
    stack: Callable[[list[jax.Array]], jax.Array],
) -> ModelParameters:
    """Fills each layer, and stacks those that are scanned over, period position by period position."""
    period, scanned = decoder.spec.period, decoder.num_scanned_periods
    embedder = fill(None, abstract_parameters(decoder.embedder_module))

    def layers(indices: range) -> Iterator[Parameters]:
        for layer in indices:
            yield fill(layer, abstract_parameters(partial(decoder.layer_module, layer)))

    stacked = []
    for position in range(period if scanned else 0):
        alike = list(layers(range(position, scanned * period, period)))
        # Popped as they are stacked, so that a layer's array is freed before the next name is stacked.
        stacked.append({name: stack([layer.pop(name) for layer in alike]) for name in tuple(alike[0])})
    return ModelParameters(embedder, tuple(stacked), tuple(layers(range(scanned * period, decoder.spec.num_layers))))


def _shapes_of(decoder: Decoder, shapes: dict[str, tuple[int, ...]], dtype: jnp.dtype) -> Parameters:
    return {
        name: jax.ShapeDtypeStruct(  # type: ignore[misc]
            shape, dtype, sharding=named(decoder.mesh, parameter_partition(name, shape, decoder.mesh))
        )
        for name, shape in shapes.items()
    }


def _stacked_shape(alike: list[jax.Array]) -> jax.Array:
    first = alike[0]
    sharding = named(first.sharding.mesh, jax.sharding.PartitionSpec(None, *first.sharding.spec))  # type: ignore[attr-defined]
    return jax.ShapeDtypeStruct((len(alike), *first.shape), first.dtype, sharding=sharding)  # type: ignore[return-value]


def _stack(alike: list[jax.Array]) -> jax.Array:
    return jax.jit(lambda *arrays: jnp.stack(arrays), out_shardings=_stacked_shape(alike).sharding)(*alike)


def _expected(decoder: Decoder, names: TensorNames) -> dict[str, tuple[int, ...]]:
    """Shapes in the checkpoint by tensor name: ours, with kv heads before replication."""
    spec = decoder.spec
    expected = {
        names.outside_layers()[name]: shape for name, shape in abstract_parameters(decoder.embedder_module).items()
    }
    for layer in range(spec.num_layers):
        shapes = abstract_parameters(partial(decoder.layer_module, layer))
        for name, shape in shapes.items():
            if name in _KV_PARAMETERS:
                shape = (spec.layers[layer].num_kv_heads * spec.layers[layer].head_dim, *shape[1:])
            expected[names.of_layer(layer)[name]] = shape
    return expected


def _repeat(decoder: Decoder, layer: int | None, name: str) -> HeadRepeat | None:
    if layer is None or name not in _KV_PARAMETERS:
        return None
    heads = decoder.spec.layers[layer].num_kv_heads
    times = decoder.kv_heads[layer] // heads
    return HeadRepeat(heads, times) if times > 1 else None
