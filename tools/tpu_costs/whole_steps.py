"""Whole steps of Gemma 3 27B on eight v6e chips, compiled ahead of time: decode, prefill, and both in one.

    python -m tools.tpu_costs.whole_steps [--backend pallas]

Prints one JSON object, measurements by step. Owns: the model's description and its load. Must never: run anything.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOPOLOGY = "v6e:2x4"
CHIPS = 8
KV_BYTES = 16 << 30
"""Of one chip: what its 32 GiB leave beside an eighth of the weights, with room for a step's temporaries."""

CONFIG = {
    "model_type": "gemma3_text",
    "vocab_size": 262_208,
    "hidden_size": 5376,
    "intermediate_size": 21_504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "max_position_embeddings": 131_072,
}

MAX_SEQUENCES = 256
STEPS = {"decode, 64 rows": (64, 64, False), "prefill, 2,048 tokens": (2048, 1, True), "mixed": (2048, 64, True)}
"""By name: tokens and rows of the bucket, and whether rows have more than one query."""


def engine(backend: str) -> Any:
    """The model on its mesh, with nothing allocated."""
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    from hkv_jax.families import model_spec_from_config
    from hkv_jax.kvcache.format import PageLayout
    from hkv_jax.model.xla_attention import AttentionBackend
    from hkv_jax.sharding import MODEL_AXIS
    from hkv_jax.testing.unbuilt_engine import UnbuiltEngine

    topology = topologies.get_topology_desc(TOPOLOGY, platform="tpu")
    return UnbuiltEngine(
        model_spec_from_config(CONFIG),
        Mesh(np.array(topology.devices[:CHIPS]), (MODEL_AXIS,)),
        jnp.dtype(jnp.bfloat16),
        KV_BYTES,
        page_layout=PageLayout.PLANES,
        scanned=True,
        max_num_seqs=MAX_SEQUENCES,
        max_chunk=2048,
        max_model_len=131_072,
        backend=AttentionBackend(backend),
    )


def measure(unbuilt: Any, bucket: tuple[int, int, bool]) -> dict[str, Any]:
    """Seconds, and bytes of one chip: arguments, those updated in place, temporaries."""
    import jax
    import numpy as np

    from hkv_jax.engine.batch_format import Bucket

    begin, processor = time.perf_counter(), time.process_time()
    compiled = unbuilt.lower_step(Bucket(*bucket)).compile()
    seconds, used = time.perf_counter() - begin, time.process_time() - processor
    memory: Any = compiled.memory_analysis()
    state = jax.tree.leaves(unbuilt.state)
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(used, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "state_bytes": sum(int(np.prod(s.sharding.shard_shape(s.shape))) * s.dtype.itemsize for s in state),
        "arena_bytes": unbuilt.layout.total_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "hbm_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        "num_arguments": len(jax.tree.leaves((unbuilt.parameters, unbuilt.state))) + 2,
    }


def main() -> int:
    """Compiles every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("pallas", "xla"), default="pallas")
    options = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    unbuilt = engine(options.backend)
    measured = {}
    for name, bucket in STEPS.items():
        measured[name] = measure(unbuilt, bucket)
        sys.stderr.write(f"{name}: {measured[name]}\n")
    sys.stdout.write(json.dumps(measured) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
