"""From a configuration to an engine that is ready: mesh, memory, layout, parameters, programs, in that order.

Owns: the choices that depend on the platform (page layout, storage dtype, layer loop, budget). Must never: know
threads, text or clients.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hkv_jax.config import EngineConfig, StepLimits, resolve_limits
from hkv_jax.engine.batch_format import BatchFormat
from hkv_jax.engine.blueprint import Blueprint
from hkv_jax.engine.buckets import Buckets
from hkv_jax.engine.engine import Engine
from hkv_jax.engine.memory import CPU_FRACTION, DEVICE_FRACTION, host_memory_bytes
from hkv_jax.engine.programs import Programs
from hkv_jax.engine.runner import Runner
from hkv_jax.engine.scheduler_config import SchedulerConfig
from hkv_jax.errors import ConfigError
from hkv_jax.families import TensorNames, read_model_spec
from hkv_jax.kvcache.format import PageLayout
from hkv_jax.kvcache.layout import KVLayout, LayoutRequest, most_useful_bytes, plan_layout
from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.model.checkpoint import Checkpoint
from hkv_jax.model.parameters import Progress, load_parameters
from hkv_jax.model.xla_attention import AttentionBackend
from hkv_jax.sharding import check_divides, make_mesh
from hkv_jax.spec import ModelSpec

logger = logging.getLogger(__name__)

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
    backend: AttentionBackend

    @property
    def platform(self) -> str:
        return str(self.mesh.devices.flat[0].platform)

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
            page_layout=self.page_layout,
            itemsize=self.kv_dtype.itemsize,
            tensor_parallel=config.tensor_parallel_size,
            max_chunk=self.limits.max_prefill_chunk,
            max_num_seqs=self.limits.max_num_seqs,
        )

    @property
    def page_layout(self) -> PageLayout:
        # Rows of 128 lanes are what a TPU can reshape for free, what the kernels read, and what scales of int8 belong
        # to. Elsewhere a token's heads lie side by side.
        planes = self.platform == "tpu" or self.backend is AttentionBackend.PALLAS or self.kv_dtype == jnp.int8
        return PageLayout.PLANES if planes else PageLayout.ROWS

    def blueprint(self, layout: KVLayout) -> Blueprint:
        # A scan over layers copies each layer's weights on CPU; on TPU it costs nothing and compiles once.
        scanned = self.platform == "tpu"
        return Blueprint(
            self.spec,
            self.mesh,
            layout,
            self.dtype,
            self.kv_dtype,
            self.limits.max_num_seqs,
            scanned=scanned,
            backend=self.backend,
        )

    def scheduler_config(self, layout: KVLayout) -> SchedulerConfig:
        return SchedulerConfig(
            **dataclasses.asdict(self.limits),
            max_model_len=layout.max_model_len,
            vocab_size=self.spec.vocab_size,
            max_bypass_seconds=self.config.max_bypass_seconds,
            max_prefix_wait_seconds=self.config.max_prefix_wait_seconds,
        )

    def cache_policy(self) -> CachePolicy:
        return CachePolicy(enabled=self.config.enable_prefix_caching, tail_repair=self.config.tail_repair == "exact")

    def buckets(self, layout: KVLayout) -> Buckets:
        return Buckets(self.limits.max_num_seqs, self.limits.max_num_batched_tokens, layout.block_sizes)


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
    layout = _layout(plan)
    blueprint, buckets = plan.blueprint(layout), plan.buckets(layout)
    parameters = load_parameters(blueprint.decoder, checkpoint, names, plan.dtype, tell)
    programs = Programs.compile(blueprint.factory(), buckets.all, (parameters, blueprint.state), tell)
    runner = Runner(programs, parameters, blueprint.state, buckets, spec.vocab_size)
    engine = Engine.over(layout, plan.scheduler_config(layout), runner, plan.cache_policy())
    return EngineParts(engine, spec, layout, plan.limits, programs)


def _plan(config: EngineConfig, spec: ModelSpec) -> _Plan:
    check_divides(spec, config.tensor_parallel_size)
    mesh = make_mesh(config.tensor_parallel_size)
    dtype = jnp.dtype(spec.dtype if config.dtype == "auto" else config.dtype)
    kv_dtype = dtype if config.kv_cache_dtype == "auto" else jnp.dtype(config.kv_cache_dtype)
    limits = resolve_limits(config, mesh.devices.flat[0].platform)
    return _Plan(config, spec, limits, mesh, dtype, kv_dtype, _backend(config, mesh.devices.flat[0].platform))


def _backend(config: EngineConfig, platform: str) -> AttentionBackend:
    """The backend that was asked for, or what suits the platform."""
    if config.attention_backend == "auto":
        return AttentionBackend.PALLAS if platform == "tpu" else AttentionBackend.XLA
    backend = AttentionBackend(config.attention_backend)
    if backend is AttentionBackend.PALLAS and platform == "cpu":
        logger.warning(
            "attention_backend is 'pallas' on a CPU: the TPU kernels are interpreted, which is exact and very slow"
        )
    elif backend is AttentionBackend.PALLAS and platform != "tpu":
        raise ConfigError(
            f"attention_backend is 'pallas', kernels for TPU, but this is {platform}; use 'auto' or 'xla'"
        )
    return backend


def _layout(plan: _Plan) -> KVLayout:
    """The layout for the memory that was given, or for a share of what there is."""
    config = plan.config
    if config.kv_cache_memory is not None:
        return plan_layout(plan.layout_request(config.kv_cache_memory))
    if plan.platform != "cpu":
        return plan_layout(plan.layout_request(_device_budget(plan)))
    share = config.kv_cache_memory_fraction or CPU_FRACTION
    # The virtual devices of a CPU share one memory.
    request = plan.layout_request(int(share * host_memory_bytes()) // plan.mesh.size)
    layout = plan_layout(request)
    # All of the share decides how long a sequence may be; only then is what nobody could use left to others.
    request = dataclasses.replace(
        request, max_model_len=layout.max_model_len, expected_average_seq_length=layout.expected_seq_length
    )
    # As much again for what finished sequences leave to later ones.
    useful = most_useful_bytes(request) * (2 if config.enable_prefix_caching else 1)
    return layout if useful >= request.budget_bytes else plan_layout(dataclasses.replace(request, budget_bytes=useful))


def _device_budget(plan: _Plan) -> int:
    """Bytes per device for the KV cache: a share of what weights, lane state and the largest step leave."""
    config = plan.config
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
    request = plan.layout_request(1)
    blueprint = plan.blueprint(plan_layout(dataclasses.replace(request, budget_bytes=most_useful_bytes(request))))
    shapes = (blueprint.parameters, blueprint.state._replace(arenas=()))
    return sum(_device_bytes(shape) for shape in jax.tree.leaves(shapes))


def _device_bytes(shape: jax.ShapeDtypeStruct) -> int:
    assert shape.sharding is not None
    local = shape.sharding.shard_shape(shape.shape)
    return math.prod(local) * jnp.dtype(shape.dtype).itemsize


def _largest_temporaries(plan: _Plan, budget_bytes: int) -> int:
    """Temporary bytes of the largest step, from the compiler; they do not depend on the size of the arena."""
    layout = plan_layout(plan.layout_request(budget_bytes))
    blueprint = plan.blueprint(layout)
    largest: BatchFormat = plan.buckets(layout).prefill[-1]
    lowered = blueprint.factory().lower_step(largest, blueprint.parameters, blueprint.state)
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
