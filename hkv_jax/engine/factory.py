"""From a configuration to an engine that is ready: mesh, memory, layout, parameters, programs, in that order.

Owns: the choices that depend on the platform (page layout, storage dtype, layer loop, budget). Must never: know
threads, text or clients.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hkv_jax.config import EngineConfig, StepLimits, resolve_limits
from hkv_jax.engine.batch_format import BatchFormat
from hkv_jax.engine.buckets import Buckets
from hkv_jax.engine.device_state import DeviceState, state_shapes
from hkv_jax.engine.engine import Engine
from hkv_jax.engine.memory import CPU_FRACTION, DEVICE_FRACTION, host_memory_bytes
from hkv_jax.engine.programs import ProgramFactory, Programs
from hkv_jax.engine.runner import Runner
from hkv_jax.engine.scheduler import Scheduler, SchedulerConfig
from hkv_jax.errors import ConfigError
from hkv_jax.families import TensorNames, read_model_spec
from hkv_jax.kvcache.format import PageLayout
from hkv_jax.kvcache.layout import KVLayout, LayoutRequest, most_useful_bytes, plan_layout
from hkv_jax.kvcache.manager import CacheManager
from hkv_jax.model.checkpoint import Checkpoint
from hkv_jax.model.kv_arena import storage_dtype
from hkv_jax.model.parameters import load_parameters, parameter_shapes
from hkv_jax.model.transformer import Decoder
from hkv_jax.model.xla_attention import AttentionSpec
from hkv_jax.sharding import check_divides, make_mesh
from hkv_jax.spec import ModelSpec

Progress = Callable[[str, int, int], None]
"""Told what was just done, how many things are done, and how many there are."""

COMPILATION_CACHE_VARIABLE = "HKV_JAX_COMPILATION_CACHE"


@dataclasses.dataclass(frozen=True)
class EngineParts:
    """An engine that is loaded and compiled, and what it was built from."""

    engine: Engine
    spec: ModelSpec
    layout: KVLayout
    limits: StepLimits
    programs: Programs


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known before anything is allocated: everything but the bytes of the KV cache."""

    config: EngineConfig
    spec: ModelSpec
    limits: StepLimits
    mesh: Mesh
    dtype: jnp.dtype
    kv_dtype: jnp.dtype

    @property
    def platform(self) -> str:
        return str(self.mesh.devices.flat[0].platform)

    def layout(self, budget_bytes: int) -> KVLayout:
        return plan_layout(self.layout_request(budget_bytes))

    def layout_request(self, budget_bytes: int) -> LayoutRequest:
        config = self.config
        return LayoutRequest(
            groups=self.spec.kv_groups(),
            budget_bytes=budget_bytes,
            max_model_len=config.max_model_len,
            config_max_len=self.spec.max_position,
            expected_average_seq_length=config.expected_average_seq_length,
            block_sizes=config.block_sizes(self.spec.kv_groups()),
            partition=config.kv_partition,
            # Rows of 128 lanes are what a TPU can reshape for free; elsewhere a token's heads lie side by side.
            page_layout=PageLayout.PLANES if self.platform == "tpu" else PageLayout.ROWS,
            itemsize=self.kv_dtype.itemsize,
            tensor_parallel=config.tensor_parallel_size,
            max_chunk=self.limits.max_prefill_chunk,
            max_num_seqs=self.limits.max_num_seqs,
        )

    def decoder(self, layout: KVLayout) -> Decoder:
        # A scan over layers copies each layer's weights on CPU; on TPU it costs nothing and compiles once.
        periods = self.spec.num_layers // self.spec.period if self.platform == "tpu" else 0
        size = self.config.tensor_parallel_size
        heads = tuple(max(layer.num_kv_heads, size) for layer in self.spec.layers)
        return Decoder(self.spec, self.mesh, heads, tuple(group.arena for group in layout.groups), periods)

    def state(self, layout: KVLayout) -> DeviceState:
        dtype = storage_dtype(self.kv_dtype, self.platform)
        return state_shapes(layout, self.mesh, self.limits.max_num_seqs, self.spec.vocab_size, dtype)

    def buckets(self, layout: KVLayout) -> Buckets:
        sizes = [group.format.block_size for group in layout.groups]
        return Buckets(self.limits.max_num_seqs, self.limits.max_num_batched_tokens, sizes)

    def program_factory(self, layout: KVLayout) -> ProgramFactory:
        attention = tuple(
            AttentionSpec(
                group.format,
                group.spec.window,
                group.table_width,
                self.spec.attention_scale,
                self.spec.attention_soft_cap,
                self.kv_dtype,
            )
            for group in layout.groups
        )
        precision = "highest" if self.dtype == jnp.float32 else None
        return ProgramFactory(self.decoder(layout), attention, layout, precision)


def build_engine(config: EngineConfig, progress: Progress | None = None) -> EngineParts:
    """Loads a model, compiles every program and allocates the cache; returns an engine that will compile nothing more.

    Raises:
        ConfigError: the configuration, the model's files, the mesh or the memory do not fit together.
        CheckpointError: the checkpoint is incomplete or broken.
    """
    tell = progress or _silent
    spec = read_model_spec(Path(config.model))
    _use_compilation_cache()
    plan = _plan(config, spec)
    checkpoint = Checkpoint(Path(config.model))
    names = TensorNames.of_checkpoint(spec, checkpoint.tensors)
    layout = plan.layout(_budget(plan))
    parameters = load_parameters(plan.decoder(layout), checkpoint, names, plan.dtype, tell)
    state, buckets = plan.state(layout), plan.buckets(layout)
    programs = Programs.compile(plan.program_factory(layout), buckets.all, (parameters, state), tell)
    runner = Runner(programs, parameters, state, buckets, spec.vocab_size)
    limits = plan.limits
    cache = CacheManager(layout, limits.max_num_seqs)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_prefill_chunk=limits.max_prefill_chunk,
            max_model_len=layout.max_model_len,
            vocab_size=spec.vocab_size,
        ),
        cache,
    )
    return EngineParts(Engine(scheduler, cache, runner), spec, layout, limits, programs)


def _plan(config: EngineConfig, spec: ModelSpec) -> _Plan:
    if config.attention_backend == "pallas":
        raise ConfigError(
            "attention_backend is 'pallas', whose kernels are not part of this version; use 'auto' or 'xla'"
        )
    check_divides(spec, config.tensor_parallel_size)
    mesh = make_mesh(config.tensor_parallel_size)
    dtype = jnp.dtype(spec.dtype if config.dtype == "auto" else config.dtype)
    kv_dtype = dtype if config.kv_cache_dtype == "auto" else jnp.dtype(config.kv_cache_dtype)
    limits = resolve_limits(config, mesh.devices.flat[0].platform)
    return _Plan(config, spec, limits, mesh, dtype, kv_dtype)


def _budget(plan: _Plan) -> int:
    """Bytes per device for the KV cache: as given, or a share of what the device has left."""
    config = plan.config
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory
    if plan.platform == "cpu":
        share = config.kv_cache_memory_fraction or CPU_FRACTION
        # The virtual devices of a CPU share one memory.
        return min(int(share * host_memory_bytes()) // plan.mesh.size, most_useful_bytes(plan.layout_request(1)))
    share = config.kv_cache_memory_fraction or DEVICE_FRACTION
    device = plan.mesh.devices.flat[0]
    free = (device.memory_stats() or {}).get("bytes_limit", 0) - _fixed_bytes(plan)
    if free <= 0:
        raise ConfigError(
            f"{device.device_kind} has no memory left for a KV cache after weights and lane state; "
            "raise tensor_parallel_size or lower max_num_seqs"
        )
    return int(share * (free - _largest_temporaries(plan, int(share * free))))


def _fixed_bytes(plan: _Plan) -> int:
    """Bytes of one device that weights and lane state take."""
    layout = plan.layout(most_useful_bytes(plan.layout_request(1)))
    shapes = (parameter_shapes(plan.decoder(layout), plan.dtype), plan.state(layout)._replace(arenas=()))
    return sum(_device_bytes(shape) for shape in jax.tree.leaves(shapes))


def _device_bytes(shape: jax.ShapeDtypeStruct) -> int:
    assert shape.sharding is not None
    local = shape.sharding.shard_shape(shape.shape)
    return math.prod(local) * jnp.dtype(shape.dtype).itemsize


def _largest_temporaries(plan: _Plan, budget_bytes: int) -> int:
    """Temporary bytes of the largest step, from the compiler; they do not depend on the size of the arena."""
    layout = plan.layout(budget_bytes)
    largest: BatchFormat = plan.buckets(layout).prefill[-1]
    parameters = parameter_shapes(plan.decoder(layout), plan.dtype)
    lowered = plan.program_factory(layout).lower_step(largest, parameters, plan.state(layout))
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None
    return int(analysis.temp_size_in_bytes)


def _use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless jax was told where already."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    folder = os.environ.get(COMPILATION_CACHE_VARIABLE) or str(Path.home() / ".cache" / "hkv-jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _silent(_what: str, _done: int, _total: int) -> None:
    """Nobody watches."""
