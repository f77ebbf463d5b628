"""Small KV caches for tests: a hybrid of one global and one sliding group, in kilobytes."""

from __future__ import annotations

import dataclasses
from typing import Any

from hkv_jax.kvcache.format import PageLayout
from hkv_jax.kvcache.layout import LayoutRequest
from hkv_jax.spec import KVGroupSpec, LayerKind


def tiny_group(window: int | None, num_layers: int = 2, num_kv_heads: int = 1, head_dim: int = 8) -> KVGroupSpec:
    """A KV group, global without a ``window`` (tokens)."""
    kind = LayerKind.GLOBAL if window is None else LayerKind.SLIDING
    return KVGroupSpec(str(kind), kind, window, num_kv_heads, head_dim, tuple(range(num_layers)))


def tiny_layout_request(**changes: Any) -> LayoutRequest:
    """A request for 1 global and 3 sliding layers, window 16, blocks of 8 and 4 tokens; ``changes`` are its fields."""
    request = LayoutRequest(
        groups=(tiny_group(None, num_layers=1), tiny_group(16, num_layers=3)),
        budget_bytes=64 * 1024,
        max_model_len=128,
        config_max_len=4096,
        expected_average_seq_length=None,
        block_sizes={"global": 8, "sliding": 4},
        partition="moving",
        page_layout=PageLayout.ROWS,
        itemsize=4,
        tensor_parallel=1,
        max_chunk=32,
        max_num_seqs=8,
    )
    # Blocks named for a kind that the changed groups lack would be refused.
    if "groups" in changes and "block_sizes" not in changes:
        kinds = {str(group.kind) for group in changes["groups"]}
        changes["block_sizes"] = {kind: size for kind, size in request.block_sizes.items() if kind in kinds}
    return dataclasses.replace(request, **changes)
