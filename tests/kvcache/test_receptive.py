"""R, for models that are known, and against layers that carry sets of exact positions instead of numbers."""

from __future__ import annotations

import numpy as np
import pytest

from hkv_jax.kvcache.receptive import receptive_tokens
from hkv_jax.spec import KVGroupSpec, LayerKind


def groups_of(windows: list[int | None], block_size: int) -> tuple[list[KVGroupSpec], list[int]]:
    """The KV groups of layers with these windows (``None``: global), and their block sizes."""
    groups = []
    for window in dict.fromkeys(windows):
        kind = LayerKind.GLOBAL if window is None else LayerKind.SLIDING
        layers = tuple(layer for layer, other in enumerate(windows) if other == window)
        groups.append(KVGroupSpec(f"{kind}_{window}", kind, window, 1, 8, layers))
    return groups, [block_size] * len(groups)


def every(period: int, num_layers: int, window: int, first_global: int | None = None) -> list[int | None]:
    """Windows of layers of which one in ``period`` is global, the first of them ``first_global``."""
    first = period - 1 if first_global is None else first_global
    return [None if layer % period == first else window for layer in range(num_layers)]


MIMO_GLOBAL = {0, 5, 11, 17, 23, 29, 35, 41, 47}

MODELS = {
    "gpt-oss-20b": (every(2, 24, 128), 16, 1525),
    "gpt-oss-120b": (every(2, 36, 128), 16, 2287),
    "MiMo-V2-Flash": ([None if layer in MIMO_GLOBAL else 128 for layer in range(48)], 16, 4954),
    "Gemma 3 270M": (every(6, 18, 512), 32, 7666),
    "Gemma 3 1B": (every(6, 26, 512), 32, 11243),
    "Gemma 3 27B": (every(6, 62, 1024), 64, 53197),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_lengths_of_known_models(name: str) -> None:
    windows, block_size, expected = MODELS[name]
    assert receptive_tokens(*groups_of(windows, block_size)) == expected


def first_exact(windows: list[int | None], start: int, end: int) -> list[int]:
    """For each layer the first position of a run ``[start, end)`` from which on all K/V is exact; ``end`` if none is.

    A sliding layer has no K/V below ``start``; a global one has exact, cached K/V of all positions.
    """
    exact = np.ones(end - start, bool)
    firsts = []
    for window in windows:
        wrong = np.flatnonzero(~exact)
        firsts.append(start + (int(wrong[-1]) + 1 if len(wrong) else 0))
        if window is not None:
            sees_all = [i + 1 >= window and exact[i + 1 - window : i + 1].all() for i in range(len(exact))]
            exact = exact & np.array(sees_all, bool)
    return firsts


def tails_are_exact(windows: list[int | None], block_size: int, start: int, end: int) -> bool:
    return all(
        first <= end - -(-(window - 1) // block_size) * block_size
        for window, first in zip(windows, first_exact(windows, start, end), strict=True)
        if window is not None
    )


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("windows", [
    [4] * 3 + [None], [5] * 20 + [None], [None, 16] * 6, [17, None] * 3,
    [100, None, 5], [5, None, 100], [4, 5, 16, None, 17, 4], [None, 1, 1],
])  # fmt: skip
def test_so_many_tokens_are_enough_and_one_less_is_not(windows: list[int | None], block_size: int) -> None:
    tokens = receptive_tokens(*groups_of(windows, block_size))
    assert tokens is not None
    end = tokens + 7 * block_size
    assert tails_are_exact(windows, block_size, end - tokens, end)
    assert not tokens or not tails_are_exact(windows, block_size, end - tokens + 1, end)


def test_the_window_alone_is_too_short_a_run() -> None:
    windows: list[int | None] = [16, 16, None, 16]
    tokens = receptive_tokens(*groups_of(windows, 4))
    assert tokens == 2 * 15 + 16
    assert not tails_are_exact(windows, 4, 200 - (tokens - 15), 200)


def test_without_global_layers_nothing_is_rebuilt() -> None:
    assert receptive_tokens(*groups_of([16, 16, 5], 4)) is None


def test_without_sliding_layers_there_is_nothing_to_run() -> None:
    assert receptive_tokens(*groups_of([None, None], 4)) == 0


def test_layers_count_in_their_order_whatever_group_they_are_of() -> None:
    # A narrow layer above a wide one needs only its own tail more; below it, it delays the wide one's whole tail.
    assert receptive_tokens(*groups_of([None, 5, 33], 4)) == 4 + 32
    assert receptive_tokens(*groups_of([None, 33, 5], 4)) == 32 + 4
    # Here the wide one's whole blocks reach further back than all that the narrow one needs.
    groups, _ = groups_of([None, 100, 5], 4)
    assert receptive_tokens(groups, [64, 64, 4]) == 128
    assert receptive_tokens(groups, [64, 4, 4]) == 99 + 4
