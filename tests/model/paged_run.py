"""Sequences run in uneven steps through paged attention, with NaN wherever no key of theirs lies.

Owns: the host's bookkeeping for them, written out plainly, and what attention must give. Must never: decide what is a
mistake; tests do.

The arena starts as NaN, pages become NaN again when their block leaves the window, and pages are recycled at once:
whatever reads a key that it must not see, or a page of somebody else, gives NaN or a wrong number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from hkv_jax.kvcache.format import NO_SLOT, KVFormat, PageLayout
from hkv_jax.model.attention import GroupStep, LayerArrays, write_and_attend
from hkv_jax.model.kv_arena import storage_dtype
from hkv_jax.model.xla_attention import AttentionSpec, StepRows
from hkv_jax.sharding import make_mesh
from hkv_jax.testing.reference_attention import ReferenceAttention

LENGTH = 61
LANES, ROWS, TOKENS = 5, 4, 32
LAYERS, LAYER = 2, 1
LANE_OF_SEQUENCE = (3, 0, 4)
SCALE = 0.3

# Each step: (sequence, how many of its tokens). Decode alone, prefill alone, and both in one step, ragged.
STEPS = (
    ((0, 1),),
    ((0, 1), (1, 20)),
    ((1, 1), (0, 17), (2, 5)),
    ((2, 1), (0, 1), (1, 1)),
    ((1, 1), (2, 31)),
    ((2, 1), (0, 9), (1, 16)),
    ((0, 1), (2, 1)),
    ((1, 1), (0, 30)),
    ((1, 1), (2, 1), (0, 1)),
    ((1, 20), (2, 11)),
    *[((2, 1),)] * 10,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention group on ``chips`` chips; ``window`` None is global."""

    window: int | None
    block: int
    chips: int = 1
    kv_heads: int = 2
    heads: int = 4
    dim: int = 16
    layout: PageLayout = PageLayout.ROWS
    sinks: bool = False
    soft_cap: float | None = None
    dtype: str = "float32"

    @cached_property
    def held_heads(self) -> int:
        """kv heads after replication."""
        return max(self.kv_heads, self.chips)

    @cached_property
    def kv_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    def spec(self, window: int | None) -> AttentionSpec:
        """``window`` is what the device believes."""
        heads = self.held_heads // self.chips
        fmt = KVFormat(self.layout, self.block, heads, self.dim, self.kv_dtype.itemsize, LAYERS)
        return AttentionSpec(fmt, window, self.table_width, SCALE, self.soft_cap, self.kv_dtype)

    @cached_property
    def table_width(self) -> int:
        longest = -(-LENGTH // self.block)
        return longest if self.window is None else min(longest, -(-(self.window - 1) // self.block) + 1)


class PagedRun:
    """Three sequences of random tokens, the host's bookkeeping for them written out plainly, and the device's part."""

    def __init__(self, case: Case, believed_window: int | None, contexts: tuple[int, int, int] = (0, 0, 0)) -> None:
        """``contexts``: where each sequence begins, with nothing of what precedes it in the pool."""
        rng = np.random.default_rng(case.block)
        self.case, self.spec = case, case.spec(believed_window)
        self.mesh = make_mesh(case.chips)

        def tokens(heads: int) -> NDArray:
            # Rounded to the KV dtype, so that the reference sees what the device sees.
            return rng.normal(size=(3, LENGTH, heads, case.dim)).astype(case.kv_dtype)

        self.queries, self.keys, self.values = tokens(case.heads), tokens(case.kv_heads), tokens(case.kv_heads)
        self.sinks = rng.normal(size=case.heads).astype(np.float32) if case.sinks else None
        self.outputs: list[list[NDArray]] = [[], [], []]
        self.all_finite = True
        self.contexts = contexts
        self.computed = list(contexts)
        self.blocks: list[dict[int, int]] = [{}, {}, {}]
        self.free = list(range(3 * (case.table_width + 8)))
        self.num_pages = len(self.free) * LAYERS
        fmt = self.spec.format
        shape = (case.chips, self.num_pages, fmt.page_elements)
        stored = storage_dtype(case.kv_dtype, "cpu")
        self.arena = np.full(shape, np.nan, case.kv_dtype).view(stored)
        self.tables = np.zeros((LANES, case.table_width), np.int32)
        self.program = jax.jit(self._on_device, static_argnames="has_prefill")

    def _on_device(self, step: tuple, arrays: tuple, arena: jax.Array, has_prefill: bool) -> tuple:
        tables, slots, rows = step
        group = GroupStep(self.spec, tables, slots, rows)
        queries, keys, values = arrays
        sinks = None if self.sinks is None else jnp.asarray(self.sinks)
        layer = LayerArrays(jnp.int32(LAYER), queries, keys, values, sinks)
        return write_and_attend(self.mesh, group, layer, arena, has_prefill)

    def run(self, steps: Sequence[Sequence[tuple[int, int]]]) -> list[NDArray]:
        """Outputs of each sequence, [tokens run, H, D]."""
        for step in steps:
            self._step(step)
        return [np.concatenate(parts) for parts in self.outputs]

    def _step(self, step: Sequence[tuple[int, int]]) -> None:
        case = self.case
        assert [count for _, count in step] == sorted((c for _, c in step), key=lambda c: c != 1), "decode rows first"
        has_prefill = any(count > 1 for _, count in step)
        size = TOKENS if has_prefill else ROWS
        rng = np.random.default_rng(0)

        def padding(heads: int) -> NDArray:
            return rng.normal(size=(size, heads, case.dim)).astype(case.kv_dtype)

        queries, keys, values = padding(case.heads), padding(case.held_heads), padding(case.held_heads)
        slots, ends = np.full(size, NO_SLOT, np.int32), [0]
        updates: list[tuple[int, int, int]] = []
        for sequence, count in step:
            begin, start = ends[-1], self.computed[sequence]
            here, there = slice(begin, begin + count), slice(start, start + count)
            queries[here] = self.queries[sequence, there]
            for target, source in ((keys, self.keys), (values, self.values)):
                target[here] = np.repeat(source[sequence, there], case.held_heads // case.kv_heads, axis=1)
            slots[here] = self._allocate(sequence, start, start + count, updates)
            ends.append(begin + count)
        rows = StepRows(
            self._padded([LANE_OF_SEQUENCE[s] for s, _ in step], LANES),
            self._padded([self.computed[s] for s, _ in step], 0),
            self._padded([self.contexts[s] for s, _ in step], 0),
            np.pad(np.array(ends, np.int32), (0, ROWS - len(step)), mode="edge"),
            np.int32(len(step)),
            np.int32(sum(count == 1 for _, count in step)),
        )
        if case.window is None:
            self._apply(updates)
        fmt = self.spec.format
        arena = self.arena.reshape(case.chips, -1, fmt.row_elements)
        inputs = (self.tables.copy(), slots, rows), (queries, keys, values), arena
        outputs, arena = (np.array(x) for x in self.program(*inputs, has_prefill=has_prefill))
        if case.window is not None:
            self._apply(updates)
        self.arena = arena.reshape(self.arena.shape)
        self.all_finite &= bool(np.isfinite(outputs.astype(np.float32)).all())
        for (sequence, count), begin in zip(step, ends, strict=False):
            self.outputs[sequence].append(outputs[begin : begin + count])
            self.computed[sequence] += count

    def _allocate(self, sequence: int, start: int, end: int, updates: list[tuple[int, int, int]]) -> list[int]:
        """Releases what left the window, makes room, and names the slot of each new token."""
        size, window, blocks = self.case.block, self.case.window, self.blocks[sequence]
        for number in [n for n in blocks if window is not None and (n + 1) * size <= start - window + 1]:
            block = blocks.pop(number)
            self.arena[:, block * LAYERS : (block + 1) * LAYERS] = np.array(np.nan, self.case.kv_dtype).view(
                self.arena.dtype
            )
            self.free.append(block)
        slots = []
        for position in range(start, end):
            number = position // size
            if window is not None and (number + 1) * size <= end - window + 1:
                slots.append(NO_SLOT)
                continue
            if number not in blocks:
                blocks[number] = self.free.pop()
                page = blocks[number] * LAYERS
                updates.append((LANE_OF_SEQUENCE[sequence], number % self.case.table_width, page))
            slots.append(blocks[number] * LAYERS * size + position % size)
        return slots

    def _apply(self, updates: list[tuple[int, int, int]]) -> None:
        for lane, column, page in updates:
            self.tables[lane, column] = page

    @staticmethod
    def _padded(values: list[int], fill: int) -> NDArray:
        return np.array(values + [fill] * (ROWS - len(values)), np.int32)

    def expected(self, sequence: int, window: int | None) -> NDArray:
        sinks = None if self.sinks is None else self.sinks.astype(np.float64)
        reference = ReferenceAttention(window, SCALE, self.case.soft_cap, sinks)
        arrays = (self.queries, self.keys, self.values)
        run = slice(self.contexts[sequence], self.computed[sequence])
        return reference(*(x[sequence, run].astype(np.float64) for x in arrays))

    def check(self, tolerance: float, steps: Sequence[Sequence[tuple[int, int]]] = STEPS) -> None:
        for sequence, outputs in enumerate(self.run(steps)):
            assert self.computed[sequence] > 50
            np.testing.assert_allclose(
                outputs.astype(np.float64), self.expected(sequence, self.case.window), atol=tolerance, rtol=0
            )
        assert self.all_finite, "padding must stay finite"
        untouched = self.arena.view(self.case.kv_dtype)[:, LAYER - 1 :: LAYERS]
        assert np.isnan(untouched.astype(np.float32)).all(), "another layer's pages were written"
