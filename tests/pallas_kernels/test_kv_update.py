"""Prefill writes: the whole pool, bit for bit, after rows that begin and end anywhere."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_update.items import ITEM_FIELDS, WriteItems, write_items
from pallas_kernels.kv_update.ops import update
from pallas_kernels.pages import LANES, NO_SLOT, PageGeometry
from pallas_kernels.prefill_rows import StepTokens
from pallas_kernels.scales import NewKV
from tests.pallas_kernels.interpreted import INTERPRET, assert_same_bits, settled_call
from tests.pallas_kernels.pools import NanPool, drawn_tokens

NUM_LAYERS = 2
LAYER = 1
NUM_BLOCKS = 40


@dataclasses.dataclass(frozen=True)
class UpdateCase:
    """``rows`` are (position of the first token, number of tokens, first block that is kept) after decode rows."""

    pages: PageGeometry
    rows: tuple[tuple[int, int, int], ...]
    num_tokens: int = 64
    decode_rows: int = 3
    dtype: str = "bfloat16"

    @property
    def tokens(self) -> StepTokens:
        lengths = [1] * self.decode_rows + [length for _, length, _ in self.rows] + [0]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        positions = [3] * self.decode_rows + [start for start, _, _ in self.rows] + [0]
        num_rows = len(lengths)
        arrays = (range(num_rows), positions, [0] * num_rows, starts, self.decode_rows, num_rows - 1)
        return StepTokens(*(jnp.asarray(array, jnp.int32) for array in arrays))

    def slots(self) -> np.ndarray:
        """Slots in blocks of no order; those of decode rows are somebody else's to write."""
        free = iter(np.random.default_rng(1).permutation(NUM_BLOCKS))
        slots = np.full(self.num_tokens, NO_SLOT, np.int32)
        slots[: self.decode_rows] = 5
        block = self.pages.block_size
        for row, (start, length, first_kept) in enumerate(self.rows, start=self.decode_rows):
            token = int(self.tokens.query_starts[row])
            held: dict[int, int] = {}
            for position in range(max(start, first_kept * block), start + length):
                page = held.setdefault(position // block, -1)
                if page < 0:
                    page = held[position // block] = int(next(free)) * NUM_LAYERS
                slots[token + position - start] = page * block + position % block
        return slots


def check(case: UpdateCase) -> WriteItems:
    rng, pages, block = np.random.default_rng(0), case.pages, case.pages.block_size
    new = NewKV(*drawn_tokens(rng, case.num_tokens, pages, case.dtype))
    slots, pool = case.slots(), NanPool(pages, case.dtype, NUM_BLOCKS * NUM_LAYERS)
    others = drawn_tokens(rng, NUM_BLOCKS * NUM_LAYERS, pages, case.dtype)
    for page in range(NUM_BLOCKS * NUM_LAYERS):
        pool.put(page, page % block, others, page)
    arena = pool.arena()
    for token in range(case.decode_rows, int(case.tokens.query_starts[-1])):
        if slots[token] != NO_SLOT:
            page, offset = divmod(int(slots[token]), block)
            pool.put(page + LAYER, offset, new, token)
    items = jax.jit(lambda s: write_items(pages, case.tokens, s))(jnp.asarray(slots))
    written = settled_call(lambda n, a: update(pages, n, a, jnp.int32(LAYER), items, INTERPRET), new, arena)
    jax.tree.map(assert_same_bits, written, pool.arena())
    return items


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_rows_that_begin_and_end_anywhere(dtype: str) -> None:
    check(UpdateCase(PageGeometry(32, 2, 128, 128), ((5, 9, 0), (70, 20, 0), (64, 29, 0)), dtype=dtype))


@pytest.mark.parametrize("block", [64, 128, 256])
def test_scales_beside_blocks_of_several_sizes(block: int) -> None:
    rows = ((block, block + 9, 0), (block - 5, 20, 0))
    check(UpdateCase(PageGeometry(block, 2, 64, 64), rows, num_tokens=512, dtype="int8"))


def test_whole_blocks_are_copied_and_edges_turned() -> None:
    case = UpdateCase(PageGeometry(16, 2, 128, 128), ((16, 40, 0), (7, 20, 0)), decode_rows=0)
    items = check(case)
    # Two whole blocks and a half; then a row whose tokens lie between tiles.
    fields = np.asarray(items.items).reshape(-1, ITEM_FIELDS)[: int(items.num_items[0])]
    assert fields[:, 3].tolist() == [16, 16, 8, 9, 11]


def test_what_leaves_the_window_is_not_written() -> None:
    items = check(UpdateCase(PageGeometry(16, 2, 64, 64), ((5, 40, 2), (70, 15, 5))))
    assert int(items.num_items[0]) == 2


def test_a_step_of_fewer_tokens_than_a_block() -> None:
    check(UpdateCase(PageGeometry(64, 1, 256, 256), ((5, 9, 0),), num_tokens=16))


def test_keys_wider_than_values() -> None:
    check(UpdateCase(PageGeometry(16, 2, 192, 128), ((0, 50, 0),), decode_rows=0))


def test_nothing_to_write() -> None:
    items = check(UpdateCase(PageGeometry(16, 1, 128, 128), ((5, 9, 9),)))
    assert int(items.num_items[0]) == 0


def test_keys_of_another_dtype_are_refused() -> None:
    pages = PageGeometry(16, 1, 128, 128)
    new = jnp.zeros((16, 1, 128), jnp.float32)
    items = WriteItems(jnp.zeros(4, jnp.int32), jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="the pool bfloat16; round them to the pool's dtype"):
        update(pages, NewKV(new, new), jnp.zeros((1, 64, LANES), jnp.bfloat16), jnp.int32(0), items)
