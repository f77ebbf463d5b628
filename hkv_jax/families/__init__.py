"""From a Hugging Face model folder to a ``ModelSpec``: one small file a family, no jax.

Owns: which families there are, and reading ``config.json`` as transformers 5 does: an absent field has the default of
its config class. Strict beyond that: an unknown architecture, or a field that may change the result and is not
supported, is a ``ConfigError`` that names it. Must never: import jax or read a weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from hkv_jax.errors import ConfigError
from hkv_jax.families import cwm, gemma2, gemma3, llama, mistral, qwen3
from hkv_jax.families.decoder import check_eos, computable_dtype
from hkv_jax.families.fields import Fields, read_json_object, shown
from hkv_jax.families.generation import generation_eos, read_generation_config, read_generation_defaults
from hkv_jax.families.harmless import settle_unread
from hkv_jax.families.tensor_names import TensorNames
from hkv_jax.families.weight_files import INDEX_FILE, SINGLE_FILE, common_dtype, read_weight_files
from hkv_jax.spec import ModelSpec

__all__ = ["SUPPORTED", "TensorNames", "model_spec_from_config", "read_generation_defaults", "read_model_spec"]

CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True, slots=True)
class _Family:
    read: Callable[[Fields], ModelSpec]
    architectures: tuple[str, ...]
    ignored: tuple[str, ...] = ()


_FAMILIES = {
    "cwm": _Family(cwm.read, cwm.ARCHITECTURES),
    "gemma2": _Family(gemma2.read, gemma2.ARCHITECTURES, gemma2.IGNORED),
    "gemma3": _Family(gemma3.read, gemma3.ARCHITECTURES, gemma3.IGNORED),
    "gemma3_text": _Family(gemma3.read_text, gemma3.TEXT_ARCHITECTURES, gemma3.TEXT_IGNORED),
    "llama": _Family(llama.read, llama.ARCHITECTURES),
    "mistral": _Family(mistral.read, mistral.ARCHITECTURES),
    "qwen3": _Family(qwen3.read, qwen3.ARCHITECTURES),
}
SUPPORTED = tuple(_FAMILIES)
"""The ``model_type`` values that can be served."""


def read_model_spec(folder: Path) -> ModelSpec:
    """The model of a folder, from ``config.json`` and ``generation_config.json``.

    A config without a data type takes that of the weights, if they are there.

    Raises:
        ConfigError: the folder or its ``config.json`` cannot be read, or the model is not supported.
        CheckpointError: the data type is looked for in the weights, and they are broken.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"model: {folder} is not a folder; give one that holds {CONFIG_FILE} and the weights "
            "('demo' is the bundled one, tools/make_real_models.py writes others)"
        )
    config = read_json_object(folder / CONFIG_FILE)
    spec = model_spec_from_config(config, read_generation_config(folder))
    has_weights = any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))
    if has_weights and not _says_dtype(config):
        stored = common_dtype(read_weight_files(folder))
        spec = dataclasses.replace(spec, dtype=computable_dtype(stored)) if stored else spec
    return spec


def model_spec_from_config(
    config: Mapping[str, object], generation_config: Mapping[str, object] | None = None
) -> ModelSpec:
    """The model that a parsed ``config.json`` describes; the EOS ids are those of ``generation_config``, if it has any.

    Raises:
        ConfigError: the architecture is unknown, or a field is out of range or not supported.
    """
    fields = Fields(config, CONFIG_FILE)
    model_type = fields.choice("model_type", "", SUPPORTED)
    family = _FAMILIES[model_type]
    _check_architectures(fields, family)
    spec = family.read(fields)
    settle_unread(fields, model_type, family.ignored)
    eos = generation_eos(generation_config or {}) or spec.eos_token_ids
    return check_eos(dataclasses.replace(spec, eos_token_ids=eos))


def _check_architectures(fields: Fields, family: _Family) -> None:
    """The head of the network: a classifier's checkpoint has the same ``model_type``."""
    given = fields.raw("architectures")
    if given is not None and (
        not isinstance(given, list) or not set(map(shown, given)) & set(map(shown, family.architectures))
    ):
        raise fields.error("architectures", f"a list with {' or '.join(family.architectures)}")


def _says_dtype(config: Mapping[str, object]) -> bool:
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, dict) else (config,)
    return any(part.get(name) is not None for part in parts for name in ("dtype", "torch_dtype"))
