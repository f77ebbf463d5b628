"""The same damage as ``damage`` does to the engine's model, for the dense one: windows and RoPE.

Owns: the list of damaged shapes that the model card tells the scores of. Must never: run them.
"""

from __future__ import annotations

import dataclasses

from tools.demo_training.model import Shape


def damaged_shapes(shape: Shape) -> dict[str, Shape]:
    """Each damage by its name in the model card; the whole model is the first."""
    window = next(one for one in shape.windows if one is not None)
    sizes = (4, window // 2, window - 1, window + 1)
    shapes = {"none": shape} | {f"window {size}": _window(shape, size) for size in sizes}
    shapes |= {f"global layer {layer} windowed": _windowed_global(shape, layer, window) for layer in shape.globals_at}
    others = tuple(layer for layer in range(shape.num_layers) if layer not in shape.globals_at)
    return shapes | {"RoPE swapped": dataclasses.replace(shape, globals_at=others)}


def _window(shape: Shape, size: int) -> Shape:
    return dataclasses.replace(shape, windows=tuple(None if one is None else size for one in shape.windows))


def _windowed_global(shape: Shape, layer: int, window: int) -> Shape:
    windows = list(shape.windows)
    windows[layer] = window
    return dataclasses.replace(shape, windows=tuple(windows))
