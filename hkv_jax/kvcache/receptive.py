"""How many tokens must be run again before a prefix so that its sliding K/V is exact.

The run starts with no sliding K/V at all. What it computes is wrong near its start; a sliding layer carries an error
W - 1 tokens forward, and a global layer carries none, because it reads cached K/V of earlier positions. K/V of the k-th
sliding layer (from the bottom) is therefore exact from the sum of W_j - 1 over the layers j below it on.
"""

from __future__ import annotations

from collections.abc import Sequence

from hkv_jax.spec import KVGroupSpec, LayerKind


def receptive_tokens(groups: Sequence[KVGroupSpec], block_sizes: Sequence[int]) -> int | None:
    """R: tokens to run before a prefix whose whole tail blocks are to be exact; ``None`` without global layers.

    The maximum over the sliding layers of what lies below a layer plus its own tail in whole blocks.
    """
    if all(group.kind is not LayerKind.GLOBAL for group in groups):
        return None
    layers = sorted(
        (layer, group.window, size)
        for group, size in zip(groups, block_sizes, strict=True)
        if group.window is not None
        for layer in group.layers
    )
    carried = most = 0
    for _, window, size in layers:
        most = max(most, carried - (-(window - 1) // size) * size)
        carried += window - 1
    return most
