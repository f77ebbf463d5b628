"""Ways to break the cache or the model, each of which the recall of the demo model must show.

Owns: what is done, to the description of a model or to a cache that is about to be used. Must never: be reached from
the package; this is for tests and for the model card.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkv_jax.kvcache.manager import CacheManager
from hkv_jax.spec import LayerKind, LayerSpec, ModelSpec

SpecChanges = tuple[tuple[str, Any], ...]
"""Fields of a ``ModelSpec`` and their damaged values."""


def window(spec: ModelSpec, tokens: int) -> SpecChanges:
    """Every sliding layer sees ``tokens`` tokens."""
    layers = tuple(
        dataclasses.replace(layer, window=tokens) if layer.window is not None else layer for layer in spec.layers
    )
    return (("layers", layers),)


def windowed_global(spec: ModelSpec, layer: int) -> SpecChanges:
    """Global layer ``layer`` sees no more than the sliding layers do; its RoPE stays."""
    width = next(one.window for one in spec.layers if one.window is not None)
    layers = list(spec.layers)
    layers[layer] = dataclasses.replace(layers[layer], kind=LayerKind.SLIDING, window=width)
    return (("layers", tuple(layers)),)


def swapped_rope(spec: ModelSpec) -> SpecChanges:
    """Global layers turn by the sliding layers' angles, and the other way round."""
    ropes = {layer.kind: layer.rope for layer in spec.layers}
    other = dict(zip(ropes, reversed(ropes.values()), strict=True))
    layers: tuple[LayerSpec, ...] = tuple(dataclasses.replace(layer, rope=other[layer.kind]) for layer in spec.layers)
    return (("layers", layers),)


def wrong_table_entry(cache: CacheManager, column: int) -> None:
    """In the global group, ``column`` of every lane names the page of the column before it."""
    take = cache.take_table_updates
    pages: dict[tuple[int, int], int] = {}

    def damaged(group: int) -> NDArray[np.int32]:
        updates = take(group)
        if cache.layout.groups[group].spec.window is None:
            pages.update({(int(lane), int(place)): int(page) for lane, place, page in updates})
            for update in updates:
                if update[1] == column:
                    update[2] = pages[int(update[0]), column - 1]
        return updates

    cache.take_table_updates = damaged  # type: ignore[method-assign]


def early_release(cache: CacheManager, num_tokens: int) -> None:
    """Sliding groups release what the window of a position ``num_tokens`` later no longer reaches: a step too early."""
    for group in cache._groups:
        if group.window is not None:
            group.release_window = _ahead(group.release_window, num_tokens)  # type: ignore[assignment, method-assign]


def _ahead(release: Callable[[int, int], Any], num_tokens: int) -> Callable[[int, int], Any]:
    return lambda lane, start: release(lane, start + num_tokens)
