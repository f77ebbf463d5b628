"""Which device holds what: the mesh, and the partition of every parameter and of the device state.

Owns: the mesh axis ``model`` (tensor parallelism) and the map from a parameter's name to its ``PartitionSpec``. Must
never: hold arrays.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hkv_jax.errors import ConfigError
from hkv_jax.spec import ModelSpec

MODEL_AXIS = "model"

REPLICATED = PartitionSpec()
OVER_CHIPS = PartitionSpec(MODEL_AXIS)
OVER_HEADS = PartitionSpec(None, MODEL_AXIS, None)
OVER_VOCABULARY = PartitionSpec(None, MODEL_AXIS)

# Weights keep the checkpoint's [out, in] layout. Heads, MLP width and vocabulary are split; what is summed over a split
# axis (o, down) is split on its input.
_SPLIT_OUTPUT = ("q", "k", "v", "gate", "up", "embedding", "lm_head")
_SPLIT_INPUT = ("o", "down")
_SPLIT_BIAS = ("q_bias", "k_bias", "v_bias", "gate_bias", "up_bias")


def make_mesh(tensor_parallel_size: int, devices: list[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh over the first ``tensor_parallel_size`` devices.

    Raises:
        ConfigError: there are fewer devices than that.
    """
    available = jax.devices() if devices is None else devices
    if tensor_parallel_size > len(available):
        raise ConfigError(
            f"tensor_parallel_size is {tensor_parallel_size}, but only {len(available)} {available[0].platform} "
            f"device(s) are visible; lower it to at most {len(available)}"
        )
    return Mesh(np.asarray(available[:tensor_parallel_size]), (MODEL_AXIS,))


def check_divides(spec: ModelSpec, tensor_parallel_size: int) -> None:
    """Checks that heads, MLP width and vocabulary can be split.

    Raises:
        ConfigError: query heads do not divide, or kv heads neither divide nor are divided.
    """
    size = tensor_parallel_size
    if spec.num_heads % size:
        raise ConfigError(f"tensor_parallel_size {size} must divide the model's {spec.num_heads} query heads")
    for layer in spec.layers:
        if layer.num_kv_heads % size and size % layer.num_kv_heads:
            raise ConfigError(
                f"tensor_parallel_size {size} must divide the model's {layer.num_kv_heads} kv heads, or they it"
            )
    if spec.intermediate_size % size:
        raise ConfigError(f"tensor_parallel_size {size} must divide the model's MLP width {spec.intermediate_size}")


def parameter_partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of parameter ``name``; an axis that the mesh does not divide (an odd vocabulary) is replicated."""
    size = mesh.shape[MODEL_AXIS]
    if name in _SPLIT_OUTPUT and shape[0] % size == 0:
        return PartitionSpec(MODEL_AXIS, None)
    if name in _SPLIT_INPUT and shape[1] % size == 0:
        return PartitionSpec(None, MODEL_AXIS)
    if name in _SPLIT_BIAS and shape[0] % size == 0:
        return PartitionSpec(MODEL_AXIS)
    return REPLICATED


def vocabulary_partition(vocab_size: int, mesh: Mesh) -> PartitionSpec:
    """The partition of arrays [rows, V] that go with the product with the vocabulary: as that is split."""
    return OVER_VOCABULARY if vocab_size % mesh.shape[MODEL_AXIS] == 0 else REPLICATED


def named(mesh: Mesh, partition: PartitionSpec) -> NamedSharding:
    """``partition`` on ``mesh``."""
    return NamedSharding(mesh, partition)
