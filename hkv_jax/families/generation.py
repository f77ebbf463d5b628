"""What ``generation_config.json`` says: the ids that end a generation, and defaults for sampling.

Owns: translating them into the names and meanings of ``SamplingParams``. Must never: know a model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from hkv_jax.errors import ConfigError, RequestError
from hkv_jax.families.fields import Fields, read_json_object, shown
from hkv_jax.sampling_params import SamplingParams

logger = logging.getLogger("hkv_jax.families")

FILE_NAME = "generation_config.json"

_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
# Ways to choose tokens that SamplingParams does not have, and the values that switch them off.
_OTHER_WAYS: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "sequence_bias": ({}, []),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "stop_strings": ([],),
}


def read_generation_config(folder: Path) -> dict[str, object]:
    """``generation_config.json`` of a model folder, empty where there is none.

    Raises:
        ConfigError: the file is not a JSON object.
    """
    path = folder / FILE_NAME
    return read_json_object(path) if path.exists() else {}


def generation_eos(values: Mapping[str, object]) -> tuple[int, ...]:
    """The EOS ids a ``generation_config.json`` gives; none is none.

    Raises:
        ConfigError: they are no ids.
    """
    return Fields(values, FILE_NAME).token_ids("eos_token_id")


def read_generation_defaults(folder: Path) -> dict[str, int | float]:
    """Sampling defaults of a model folder: arguments of ``SamplingParams`` that a request may override.

    ``do_sample: false`` is temperature 0, ``max_new_tokens`` is ``max_tokens``. Ways to choose tokens that
    ``SamplingParams`` lacks (beams, for one) are left out with one warning.

    Raises:
        ConfigError: the file is not a JSON object, or a value is out of range.
    """
    values = read_generation_config(folder)
    fields = Fields(values, str(folder / FILE_NAME))
    found: dict[str, int | float] = {}
    for theirs, ours in _SAMPLING.items():
        value = fields.raw(theirs)
        if value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise fields.error(theirs, "a number")
        found[ours] = value
    if fields.raw("do_sample") is not None and not fields.flag("do_sample", True):
        found["temperature"] = 0.0
    try:
        SamplingParams(**found)  # type: ignore[arg-type]
    except RequestError as error:
        raise ConfigError(f"{fields.where}: {error}") from error
    unused = [
        f"{name} {shown(values[name])}"
        for name, off in _OTHER_WAYS.items()
        if values.get(name) is not None and values[name] not in off
    ]
    if unused:
        logger.warning("%s: not supported, generation goes without: %s", fields.where, ", ".join(unused))
    return found
