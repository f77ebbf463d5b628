"""No compiled program copies the arena: its temporary memory is the same for an arena of any size.

That the state is donated (aliased) does not show it by itself: a program may alias and still copy on the way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hkv_jax.engine.batch_format import Bucket
from hkv_jax.engine.device_state import DeviceState
from hkv_jax.sharding import make_mesh
from hkv_jax.testing.unbuilt_engine import UnbuiltEngine, hybrid_spec

SMALL_BYTES, FACTOR = 1 << 18, 64
SLOTS = 4

LOWER: dict[str, Callable[[UnbuiltEngine], jax.stages.Lowered]] = {
    "decode, one row": lambda engine: engine.lower_step(Bucket(1, 1, False)),
    "decode, all rows": lambda engine: engine.lower_step(Bucket(SLOTS, SLOTS, False)),
    "prefill": lambda engine: engine.lower_step(Bucket(32, SLOTS, True)),
    "lane set-up": lambda engine: engine.factory.lower_lane_setup(engine.state),
    "fork": lambda engine: engine.factory.lower_forks(engine.state),
    "block copies": lambda engine: engine.factory.lower_block_copies(engine.state),
    "table rows": lambda engine: engine.factory.lower_table_rows(engine.state),
    "prefix tokens": lambda engine: engine.factory.lower_prefix_tokens(engine.state),
}


def unbuilt(dtype: str, budget_bytes: int, chips: int) -> UnbuiltEngine:
    # Three layers: one group has several pages a block, and each layer's write depends on the layer before.
    spec = hybrid_spec(3, period=3, vocab_size=64)
    return UnbuiltEngine(spec, make_mesh(chips), jnp.dtype(dtype), budget_bytes, max_num_seqs=SLOTS)


def local_bytes(state: object) -> int:
    """Bytes on one device of every array of a tree."""
    shapes = jax.tree.leaves(state)
    return sum(int(np.prod(s.sharding.shard_shape(s.shape))) * s.dtype.itemsize for s in shapes)


@cache
def memory(program: str, dtype: str, budget_bytes: int, chips: int) -> tuple[int, int, DeviceState]:
    """Temporary bytes and aliased bytes of a compiled program, and the shapes of the state."""
    engine = unbuilt(dtype, budget_bytes, chips)
    analysis = LOWER[program](engine).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes, analysis.alias_size_in_bytes, engine.state


CASES = [(program, dtype, 1) for program in LOWER for dtype in ("float32", "bfloat16")]
CASES.remove(("decode, one row", "float32", 1))
SHARDED = [("decode, all rows", "bfloat16", 2), ("fork", "float32", 2), ("block copies", "bfloat16", 2)]


@pytest.mark.parametrize(("program", "dtype", "chips"), [*CASES, *SHARDED])
def test_temporary_memory_does_not_grow_with_the_arena(program: str, dtype: str, chips: int) -> None:
    small, _, small_state = memory(program, dtype, SMALL_BYTES, chips)
    large, aliased, large_state = memory(program, dtype, FACTOR * SMALL_BYTES, chips)
    arena_bytes = local_bytes(large_state.arenas)
    assert arena_bytes > (FACTOR - 1) * local_bytes(small_state.arenas), "the arenas compared must differ"
    assert large == small
    assert large < arena_bytes / 4
    # Everything donated comes back in place.
    assert aliased >= local_bytes(large_state)


@pytest.mark.parametrize("bucket", [Bucket(1, 1, False), Bucket(SLOTS, SLOTS, False), Bucket(32, SLOTS, True)], ids=str)
def test_no_chip_collects_what_is_split_over_the_vocabulary(bucket: Bucket) -> None:
    # All to all, rows change hands; of the embedding, the counts and the logits no chip ever has the whole.
    engine = unbuilt("bfloat16", SMALL_BYTES, 2)
    text = engine.lower_step(bucket).compile().as_text()
    assert text is not None
    assert "all-to-all" in text
    gathered = re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-gather", text)
    assert gathered
    vocabulary = str(engine.spec.vocab_size)
    assert not [shape for shape in gathered if vocabulary in shape.split(",")]
