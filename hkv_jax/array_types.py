"""Axis letters and named array types: what the shape comments of the device code mean.

| letter | axis |
|---|---|
| T | query tokens of a step (bucket) |
| S | rows of a step: one sequence each (bucket) |
| Z | lanes: persistent places of running sequences |
| E | hidden size |
| H | query heads |
| K | key/value heads; G = H / K query heads share one |
| D | head dim |
| F | MLP width |
| V | vocabulary |
| P | token slots of a block |
| M | columns of a block table |
| N | keys of one tile |
| W | attention window in tokens, never an axis |

Dimensions in shape comments are global outside ``shard_map`` and local to a chip inside it.
"""

from __future__ import annotations

import jax

Hidden = jax.Array
"""[T, E], compute dtype."""

Queries = jax.Array
"""[T, H, D], compute dtype, RoPE applied."""

KeysValues = jax.Array
"""[T, K, D], KV dtype, RoPE applied to keys."""

BlockTables = jax.Array
"""i32[Z, M]: page of layer 0 of block b at column b % M."""

Logits = jax.Array
"""f32[S, V]."""

Parameters = dict[str, jax.Array]
"""The parameters of one layer, or those outside the layers, by name."""
