"""Paged attention against the reference, over whole sequences that are run in uneven steps (``paged_run``)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hkv_jax.kvcache.format import KVFormat, PageLayout
from hkv_jax.model import xla_attention
from hkv_jax.model.kv_arena import read_pages
from hkv_jax.model.xla_attention import AttentionInputs, AttentionSpec, StepRows, paged_attention
from tests.model.paged_run import ROWS, STEPS, Case, PagedRun


def covering_cases() -> list[Case]:
    """Every window with every block size; the other factors take turns, so that each value of each meets many."""
    shapes = itertools.product((None, 5, 16, 17, 48), (4, 8))
    turns = zip(itertools.cycle((1, 2, 4)), itertools.cycle((1, 1, 2)), itertools.cycle(PageLayout), strict=False)
    return [
        Case(window, block, chips, kv_heads, layout=layout)
        for (window, block), (chips, kv_heads, layout) in zip(shapes, turns, strict=False)
    ]


def name(case: Case) -> str:
    factors = [f"W{case.window}", f"P{case.block}", f"K{case.kv_heads}", f"tp{case.chips}", case.layout, f"D{case.dim}"]
    return "-".join([*factors, *(["sinks"] if case.sinks else []), *(["cap"] if case.soft_cap else [])])


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a row spans several of each kind, and tails spill into the next row."""
    monkeypatch.setattr(xla_attention, "DECODE_TILE_TOKENS", 16)
    monkeypatch.setattr(xla_attention, "QUERY_TILE_TOKENS", 8)
    monkeypatch.setattr(xla_attention, "KEY_TILE_TOKENS", 8)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("case", covering_cases(), ids=name)
def test_it_agrees_with_the_reference(case: Case) -> None:
    PagedRun(case, case.window).check(1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case(None, 8, layout=PageLayout.PLANES, dim=128, sinks=True),
        Case(16, 4, chips=2, sinks=True, soft_cap=2.0),
        Case(17, 8, chips=4, heads=8, layout=PageLayout.PLANES, dim=96, soft_cap=2.0),
    ],
    ids=name,
)
def test_sinks_soft_cap_and_wide_heads_in_tiles_as_they_are(case: Case) -> None:
    PagedRun(case, case.window).check(1e-5)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("case", [Case(16, 8, dtype="bfloat16"), Case(None, 8, dtype="bfloat16", dim=64)], ids=name)
def test_bfloat16_differs_by_its_rounding_only(case: Case) -> None:
    PagedRun(case, case.window).check(2e-2)


# Every sequence begins in the middle; what its table names below that is NaN.
FROM_THE_MIDDLE = (
    ((0, 1),),
    ((1, 1), (0, 2), (2, 5)),
    ((2, 1), (0, 1), (1, 1)),
    ((1, 1), (2, 14)),
    ((0, 1), (2, 7)),
    ((1, 10), (0, 20)),
    ((2, 1), (1, 1), (0, 14)),
    *[((2, 1), (1, 1))] * 8,
)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(
    "case",
    [Case(5, 4), Case(16, 8), Case(17, 8, sinks=True, layout=PageLayout.PLANES), Case(48, 8, chips=2)],
    ids=name,
)
def test_nothing_below_the_context_is_seen_or_read(case: Case) -> None:
    PagedRun(case, case.window, contexts=(16, 32, 24)).check(1e-5, FROM_THE_MIDDLE)


@pytest.mark.usefixtures("_small_tiles")
def test_a_forgotten_context_is_seen() -> None:
    run = PagedRun(Case(16, 8), 16, contexts=(16, 32, 24))
    expected_contexts, run.contexts = run.contexts, (0, 0, 0)
    outputs = run.run(FROM_THE_MIDDLE)
    run.contexts = expected_contexts
    for sequence in range(3):
        assert not np.isfinite(outputs[sequence][:9]).any()


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("error", [-1, 1])
def test_a_window_off_by_one_is_seen(error: int) -> None:
    run = PagedRun(Case(17, 8), believed_window=17 + error)
    outputs = run.run(STEPS)
    for sequence in range(3):
        expected = run.expected(sequence, 17)
        close = np.isclose(outputs[sequence], expected, atol=1e-3).all(axis=(1, 2))
        # Until the window is full there is nothing to get wrong; from then on every token is.
        full = 17 + min(error, 0)
        assert close[:full].all()
        assert not close[full:].any()


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("window", [None, 16])
def test_what_one_row_computes_cannot_spoil_another(window: int | None) -> None:
    run = PagedRun(Case(window, 8), window)
    run.values[1] = np.nan
    run.keys[1] = np.inf
    outputs = run.run(STEPS)
    for sequence in (0, 2):
        np.testing.assert_allclose(outputs[sequence], run.expected(sequence, window), atol=1e-5, rtol=0)


@pytest.mark.parametrize("has_prefill", [False, True])
def test_a_step_without_live_rows_is_finite(has_prefill: bool) -> None:
    spec = Case(16, 4).spec(16)
    inputs = local_inputs(spec, [])
    assert np.isfinite(paged_attention(spec, inputs, has_prefill)).all()


@pytest.mark.parametrize("length", [1, 3])
def test_a_row_that_sees_no_key_gives_zero(length: int) -> None:
    spec = Case(None, 4).spec(None)
    inputs = local_inputs(spec, [(-length, length)])
    assert not np.asarray(paged_attention(spec, inputs, has_prefill=length > 1)).any()


def local_inputs(spec: AttentionSpec, rows: Sequence[tuple[int, int]]) -> AttentionInputs:
    """One chip's arrays for ``rows`` of (start, number of queries); the arena is one page, which is all blocks."""
    fmt, count = spec.format, len(rows)
    starts, lengths = (np.array([row[part] for row in rows], np.int32) for part in (0, 1))
    tokens = max(ROWS, int(lengths.sum()))
    ends = np.concatenate([[0], lengths.cumsum()])
    step_rows = StepRows(
        jnp.arange(ROWS),
        jnp.asarray(np.pad(starts, (0, ROWS - count)), jnp.int32),
        jnp.zeros(ROWS, jnp.int32),
        jnp.asarray(np.pad(ends, (0, ROWS - count), mode="edge"), jnp.int32),
        jnp.int32(count),
        jnp.int32(np.sum(lengths == 1)),
    )
    heads, dim = fmt.num_kv_heads, fmt.head_dim
    kv = jnp.ones((tokens, heads, dim), spec.kv_dtype)
    arena = jnp.zeros((1, fmt.rows_per_page, fmt.row_elements), spec.kv_dtype)
    tables = jnp.zeros((ROWS, spec.table_width), jnp.int32)
    queries = jnp.ones((tokens, 2 * heads, dim), spec.kv_dtype)
    return AttentionInputs(queries, kv, kv, arena, jnp.int32(0), tables, step_rows, None)


def wide_spec(window: int | None, table_width: int) -> AttentionSpec:
    return AttentionSpec(KVFormat(PageLayout.ROWS, 8, 1, 8, 4, 1), window, table_width, 1.0, None, jnp.dtype("float32"))


class TestCostFollowsTheWindow:
    """Page reads are counted as the program runs; nothing is timed."""

    @pytest.fixture
    def count_pages(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        seen: list[int] = []

        def counted(arena: jax.Array, fmt: KVFormat, pages: jax.Array, *rest: Any) -> tuple[jax.Array, jax.Array]:
            jax.debug.callback(lambda: seen.append(pages.shape[0]))
            return read_pages(arena, fmt, pages, *rest)

        monkeypatch.setattr(xla_attention, "read_pages", counted)
        return seen

    @staticmethod
    def counter(spec: AttentionSpec, has_prefill: bool, seen: list[int]) -> Callable[..., int]:
        """rows → pages that one run over them reads."""
        program = jax.jit(partial(paged_attention, spec, has_prefill=has_prefill))

        def count(*rows: tuple[int, int]) -> int:
            seen.clear()
            program(local_inputs(spec, rows)).block_until_ready()
            jax.effects_barrier()
            return sum(seen)

        return count

    @pytest.mark.parametrize(("has_prefill", "length"), [(False, 1), (True, 100)])
    def test_a_window_is_read_once_at_any_context(self, has_prefill: bool, length: int, count_pages: list[int]) -> None:
        # W 64, blocks of 8: 63 older tokens lie in at most 9 blocks.
        pages = self.counter(wide_spec(64, 9), has_prefill, count_pages)
        assert [pages((start, length)) for start in (70, 1_000, 100_001)] == [9, 9, 9]

    def test_a_global_decode_reads_its_context_and_not_the_table(self, count_pages: list[int]) -> None:
        size = xla_attention.DECODE_TILE_TOKENS
        pages = self.counter(wide_spec(None, 4096), False, count_pages)
        for context in (1, 6, size, size + 1, 10_000):
            assert pages((context - 1, 1)) == -(-context // size) * size // 8

    def test_rows_pay_for_themselves_only(self, count_pages: list[int]) -> None:
        pages = self.counter(wide_spec(None, 2_000), False, count_pages)
        assert pages((9_000, 1), (20, 1)) == pages((9_000, 1)) + pages((20, 1))
        assert pages() == 0

    def test_own_keys_of_a_long_chunk_are_those_in_the_window(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int] = []
        accumulate = xla_attention._accumulate

        def counted(*arguments: Any) -> Any:
            jax.debug.callback(lambda: seen.append(1))
            return accumulate(*arguments)

        monkeypatch.setattr(xla_attention, "_accumulate", counted)
        length = xla_attention.KEY_TILE_TOKENS + 100
        tiles = self.counter(wide_spec(64, 9), True, seen)((1_000, length))
        # A tile of own keys for each tile of queries, and one of older keys for the first.
        assert tiles == -(-length // xla_attention.QUERY_TILE_TOKENS) + 1

    @pytest.mark.parametrize("has_prefill", [False, True])
    def test_no_array_of_the_program_grows_with_the_longest_sequence(self, has_prefill: bool) -> None:
        costs = []
        for width in (64, 4096):
            spec = wide_spec(None, width)
            program = jax.jit(partial(paged_attention, spec, has_prefill=has_prefill))
            compiled = program.lower(local_inputs(spec, [(5, 1)])).compile()
            memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
            assert memory is not None and cost is not None
            costs.append((memory.temp_size_in_bytes, cost["flops"]))
        assert costs[0] == costs[1]
