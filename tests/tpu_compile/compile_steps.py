"""Compiles steps of a hybrid model, on each attention backend, for a TPU v6e that need not be there; prints JSON.

Run by ``test_step_v6e.py`` in a process of its own: libtpu is loaded once a process and keeps state.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from hkv_jax.engine.batch_format import Bucket
from hkv_jax.kvcache.format import PageLayout
from hkv_jax.model.xla_attention import AttentionBackend
from hkv_jax.sharding import MODEL_AXIS
from hkv_jax.spec import Activation
from hkv_jax.testing.unbuilt_engine import UnbuiltEngine, hybrid_spec

GIB = 1 << 30


def engine(mesh: Mesh, num_layers: int, budget_bytes: int, backend: AttentionBackend) -> UnbuiltEngine:
    """Layers of the shapes of Gemma 3 270M, two sliding ones before each global one; a small vocabulary."""
    spec = hybrid_spec(
        num_layers,
        period=3,
        window=512,
        num_kv_heads=1,
        head_dim=256,
        vocab_size=1024,
        hidden_size=640,
        intermediate_size=2048,
        activation=Activation.GELU_TANH,
        max_position=32_768,
        embedding_scale=640**0.5,
        unit_offset_norm=True,
        sandwich_norm=True,
        qk_norm=True,
    )
    return UnbuiltEngine(
        spec,
        mesh,
        jnp.dtype(jnp.bfloat16),
        budget_bytes,
        page_layout=PageLayout.PLANES,
        scanned=True,
        max_num_seqs=16,
        max_chunk=256,
        max_model_len=8192,
        backend=backend,
    )


def measure(unbuilt: UnbuiltEngine, bucket: Bucket) -> dict[str, Any]:
    """What the compiler made of one step."""
    begin = time.perf_counter()
    compiled = unbuilt.lower_step(bucket).compile()
    seconds = time.perf_counter() - begin
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    state = jax.tree.leaves(unbuilt.state)
    return {
        "arena_bytes": unbuilt.layout.total_bytes,
        "state_bytes": sum(int(np.prod(s.sharding.shard_shape(s.shape))) * s.dtype.itemsize for s in state),
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "instructions": sum(" = " in line for line in text.splitlines()),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Prints one JSON object, measurements by name."""
    topology = topologies.get_topology_desc("v6e:2x2", platform="tpu")
    one, two = (Mesh(np.array(topology.devices[:chips]), (MODEL_AXIS,)) for chips in (1, 2))
    decode, prefill = Bucket(16, 16, False), Bucket(256, 16, True)
    jobs: dict[str, tuple[UnbuiltEngine, Bucket]] = {}
    for backend, prefix in ((AttentionBackend.XLA, ""), (AttentionBackend.PALLAS, "kernels, ")):
        base = engine(one, 12, GIB, backend)
        larger = dataclasses.replace(base, budget_bytes=4 * GIB)
        jobs |= {
            f"{prefix}decode": (base, decode),
            f"{prefix}decode, 4 GiB": (larger, decode),
            f"{prefix}decode, 48 layers": (engine(one, 48, GIB, backend), decode),
            f"{prefix}decode, 2 chips": (engine(two, 12, GIB, backend), decode),
            f"{prefix}prefill": (base, prefill),
            f"{prefix}prefill, 4 GiB": (larger, prefill),
        }
    measured = {}
    for name, job in jobs.items():
        measured[name] = measure(*job)
        sys.stderr.write(f"{name}: {measured[name]}\n")
    sys.stdout.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main()
