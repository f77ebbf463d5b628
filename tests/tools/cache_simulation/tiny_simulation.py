"""A small hybrid model and short requests, for tests of replays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hkv_jax.config import EngineConfig
from hkv_jax.spec import LayerKind, LayerSpec, RopeSpec
from tools.cache_simulation.model_geometry import ModelGeometry
from tools.cache_simulation.simulation import Simulation
from tools.cache_simulation.trace import TraceRequest

SLIDING = LayerSpec(LayerKind.SLIDING, 32, 1, 64, RopeSpec(1e4))
EVERYWHERE = LayerSpec(LayerKind.GLOBAL, None, 1, 64, RopeSpec(1e4))
TINY = ModelGeometry("tiny", (SLIDING, SLIDING, EVERYWHERE), max_position=4096)
BLOCKS = {"global": 32, "sliding": 16}


def request(
    name: str, segments: Sequence[tuple[str, int]], output_len: int, arrival: float = 0.0, **changes: Any
) -> TraceRequest:
    """A request; ``changes`` are ``after`` and ``think``."""
    return TraceRequest(name, arrival, changes.get("after"), changes.get("think", 0.0), tuple(segments), output_len)


def tiny_simulation(requests: Sequence[TraceRequest], policy: str = "hybrid", **options: Any) -> Simulation:
    """Blocks of 32 (global) and 16 tokens, room for plenty; ``options`` are the engine's."""
    settings = {"kv_cache_memory": 2**22, "max_model_len": 2048, "max_num_seqs": 8, "max_num_batched_tokens": 512}
    config = EngineConfig.from_options({**settings, "block_size": BLOCKS, **options})
    return Simulation(requests, TINY, config, policy)
