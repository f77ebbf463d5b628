"""From a Hugging Face ``config.json`` to KV groups: what of a model the cache sees.

Owns: the attention geometry of models whose decoder is not there yet. Must never: read weights, or guess a model type
it does not know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from hkv_jax.families import SUPPORTED, model_spec_from_config
from hkv_jax.families.fields import Fields, read_json_object
from hkv_jax.spec import KVGroupSpec, LayerKind, LayerSpec, ModelSpec, RopeSpec, group_layers

MAX_LAYERS = 4096
_KINDS = {"full_attention": LayerKind.GLOBAL, "sliding_attention": LayerKind.SLIDING}
_NO_ROPE = RopeSpec(theta=1.0)  # the cache does not see it


@dataclasses.dataclass(frozen=True, slots=True)
class ModelGeometry:
    """What the cache sees of a model: its layers that keep K/V, and the longest sequence, in tokens."""

    model_type: str
    layers: tuple[LayerSpec, ...]
    max_position: int

    def groups(self) -> tuple[KVGroupSpec, ...]:
        """The KV groups as the engine forms them."""
        return group_layers(self.layers)

    def all_global(self) -> ModelGeometry:
        """The same model for a cache that knows no windows: every layer keeps everything."""
        layers = tuple(dataclasses.replace(layer, kind=LayerKind.GLOBAL, window=None) for layer in self.layers)
        return dataclasses.replace(self, layers=layers)


def read_geometry(path: Path) -> ModelGeometry:
    """The geometry of a ``config.json``, or of the one in a folder.

    Raises:
        ConfigError: it cannot be read, or is of no known model type.
    """
    if path.is_dir():
        path = path / "config.json"
    config = read_json_object(path)
    # How weights are stored does not change what is cached.
    config.pop("quantization_config", None)
    model_type = config.get("model_type")
    if model_type in SUPPORTED:
        return _of_spec(model_spec_from_config(config))
    fields = Fields(config, str(path))
    return _READERS[fields.choice("model_type", "", sorted({*SUPPORTED, *_READERS}))](fields)


def _of_spec(spec: ModelSpec) -> ModelGeometry:
    return ModelGeometry(spec.architecture, spec.layers, spec.max_position)


def _read_gpt_oss(fields: Fields) -> ModelGeometry:
    """Layers take turns, the first slides; all have the same heads."""
    kinds = _kinds(fields, fields.count("num_hidden_layers", 36, MAX_LAYERS), lambda i: i % 2 == 1)
    heads, dim = fields.count("num_key_value_heads", 8), fields.count("head_dim", 64)
    shapes = dict.fromkeys(LayerKind, (heads, dim))
    layers = _layers(kinds, fields.count("sliding_window", 128), shapes)
    return ModelGeometry("gpt_oss", layers, fields.count("max_position_embeddings", 131_072))


def _read_gemma4(fields: Fields) -> ModelGeometry:
    return _read_gemma4_text(Fields(fields.mapping("text_config") or {}, f"{fields.where}: text_config"))


def _read_gemma4_text(fields: Fields) -> ModelGeometry:
    """Global layers may have fewer and longer kv heads; the last layers may borrow the K/V of earlier ones."""
    num_layers = fields.count("num_hidden_layers", 30, MAX_LAYERS)
    kinds = _kinds(fields, num_layers, lambda i: (i + 1) % 6 == 0 or i == num_layers - 1)
    heads, dim = fields.count("num_key_value_heads", 4), fields.count("head_dim", 256)
    global_heads = fields.optional_count("num_global_key_value_heads", None) or heads
    global_dim = fields.optional_count("global_head_dim", 512) or dim
    shapes = {LayerKind.GLOBAL: (global_heads, global_dim), LayerKind.SLIDING: (heads, dim)}
    borrowing = fields.raw("num_kv_shared_layers", 0) or 0
    if isinstance(borrowing, bool) or not isinstance(borrowing, int) or not 0 <= borrowing < num_layers:
        raise fields.error("num_kv_shared_layers", f"an integer from 0 to {num_layers - 1}, or null")
    layers = _layers(kinds[: num_layers - borrowing], fields.count("sliding_window", 512), shapes)
    return ModelGeometry("gemma4_text", layers, fields.count("max_position_embeddings", 131_072))


_READERS: dict[str, Callable[[Fields], ModelGeometry]] = {
    "gemma4": _read_gemma4,
    "gemma4_text": _read_gemma4_text,
    "gpt_oss": _read_gpt_oss,
}


def _kinds(fields: Fields, num_layers: int, is_global: Callable[[int], bool]) -> list[LayerKind]:
    given = fields.raw("layer_types")
    if given is None:
        return [LayerKind.GLOBAL if is_global(i) else LayerKind.SLIDING for i in range(num_layers)]
    if not isinstance(given, list) or len(given) != num_layers or any(one not in _KINDS for one in given):
        raise fields.error("layer_types", f"{num_layers} times {' or '.join(_KINDS)}, one for each layer")
    return [_KINDS[one] for one in given]


def _layers(kinds: list[LayerKind], window: int, shapes: dict[LayerKind, tuple[int, int]]) -> tuple[LayerSpec, ...]:
    windows = {LayerKind.GLOBAL: None, LayerKind.SLIDING: window}
    return tuple(LayerSpec(kind, windows[kind], *shapes[kind], _NO_ROPE) for kind in kinds)
