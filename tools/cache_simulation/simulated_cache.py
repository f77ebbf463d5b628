"""The cache of a simulation: from a geometry and a budget to the layout the engine would make.

Owns: what stands in for a device (page layout, limits), and a static split at a given share. Must never: do arithmetic
that ``hkv_jax.kvcache`` has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hkv_jax.config import EngineConfig, resolve_limits
from hkv_jax.engine.scheduler_config import SchedulerConfig
from hkv_jax.errors import ConfigError
from hkv_jax.kvcache.format import PageLayout
from hkv_jax.kvcache.layout import KVLayout, LayoutRequest, plan_layout
from hkv_jax.spec import KVGroupSpec, LayerKind
from tools.cache_simulation.model_geometry import ModelGeometry
from tools.cache_simulation.token_ids import VOCAB_SIZE

PLATFORM = "tpu"
"""Whose limits of a step hold where none are given: pages are the TPU kernels' unless told otherwise."""

_ITEMSIZES = {"auto": 2, "bfloat16": 2, "float32": 4, "int8": 1}


def simulated_layout(config: EngineConfig, geometry: ModelGeometry, static_share: float | None = None) -> KVLayout:
    """The layout that an engine with these options would have for a model.

    ``static_share`` is the share of the bytes that global layers get in a static split; ``None``: as the engine splits.

    Raises:
        ConfigError: there is no ``kv_cache_memory``, it does not suffice, or an option is out of range.
    """
    if config.kv_cache_memory is None:
        raise ConfigError("kv_cache_memory is not set; a simulation has no device that could tell how much there is")
    groups, limits = geometry.groups(), resolve_limits(config, PLATFORM)
    # Integers have scales by planes on every backend.
    in_rows = config.attention_backend == "xla" and config.kv_cache_dtype != "int8"
    layout = plan_layout(
        LayoutRequest(
            groups=groups,
            budget_bytes=config.kv_cache_memory,
            max_model_len=config.max_model_len,
            config_max_len=geometry.max_position,
            expected_average_seq_length=config.expected_average_seq_length,
            block_sizes=_block_sizes(config, groups),
            partition=config.kv_partition,
            page_layout=PageLayout.ROWS if in_rows else PageLayout.PLANES,
            itemsize=_ITEMSIZES[config.kv_cache_dtype],
            tensor_parallel=config.tensor_parallel_size,
            max_chunk=limits.max_prefill_chunk,
            max_num_seqs=limits.max_num_seqs,
        )
    )
    return layout if static_share is None else _split_at(layout, static_share, config.kv_cache_memory)


def simulated_limits(config: EngineConfig, layout: KVLayout) -> SchedulerConfig:
    """The limits of the scheduler for ``layout``."""
    limits = resolve_limits(config, PLATFORM)
    return SchedulerConfig(
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_prefill_chunk=limits.max_prefill_chunk,
        max_model_len=layout.max_model_len,
        vocab_size=VOCAB_SIZE,
        max_bypass_seconds=config.max_bypass_seconds,
        max_prefix_wait_seconds=config.max_prefix_wait_seconds,
    )


def _block_sizes(config: EngineConfig, groups: Sequence[KVGroupSpec]) -> dict[str, int]:
    """As the engine reads them, but for sizes of sliding layers where the policy knows no windows."""
    slides = any(group.kind is LayerKind.SLIDING for group in groups)
    sizes = config.block_sizes(groups)
    return {name: size for name, size in sizes.items() if slides or not name.startswith(LayerKind.SLIDING)}


def _split_at(layout: KVLayout, share: float, budget: int) -> KVLayout:
    """A static layout whose global arena has ``share`` of the bytes.

    Raises:
        ConfigError: the layout is not one global and one sliding arena, or a pool would lose its reserve.
    """
    kinds = [group.spec.kind for group in layout.groups]
    if layout.partition != "static" or kinds != [LayerKind.GLOBAL, LayerKind.SLIDING]:
        raise ConfigError(
            "set_static_share: needs --kv-partition static and a model with one global and one sliding group"
        )
    if not 0 < share < 1:
        raise ConfigError(f"set_static_share: {share:g}; accepted: a number between 0 and 1")
    groups, arenas = [], list(layout.arenas)
    for group, part in zip(layout.groups, (share, 1 - share), strict=True):
        slab_bytes = arenas[group.arena].slab_bytes
        num_slabs = int(part * budget) // slab_bytes
        if num_slabs < group.reserve_slabs:
            least = group.reserve_slabs * slab_bytes / budget
            raise ConfigError(
                f"set_static_share: {share} leaves the {group.spec.name} pool {part:.3f} of the memory; one sequence "
                f"of {layout.max_model_len} tokens needs {least:.3f}"
            )
        arenas[group.arena] = dataclasses.replace(arenas[group.arena], num_slabs=num_slabs)
        groups.append(dataclasses.replace(group, initial_slabs=tuple(range(num_slabs))))
    return dataclasses.replace(layout, groups=tuple(groups), arenas=tuple(arenas))
