"""The fields of ``SamplingParams`` as flags, dashes for underscores; a flag that is not given leaves its field unset.

Owns: the spelling and help of these flags. Must never: check a range (``SamplingParams`` does, with the same words for
every face).
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from hkv_jax.sampling_params import SamplingParams

_HELP = {
    "max_tokens": "output tokens, at least 1 (default: until a stop or max-model-len)",
    "min_tokens": "do not stop before that many output tokens (default 0)",
    "temperature": "0 takes the most likely token; higher is more varied (default 1.0)",
    "top_k": "draw among the K most likely tokens; 0 is all (default 0)",
    "top_p": "draw from the smallest set of tokens with that much probability, in (0, 1] (default 1.0)",
    "min_p": "leave out tokens less likely than this fraction of the most likely one, in [0, 1] (default 0)",
    "repetition_penalty": "above 1 makes tokens of prompt and output less likely (default 1.0)",
    "presence_penalty": "make tokens of the output less likely, in [-2, 2] (default 0)",
    "frequency_penalty": "the same for every time they occurred, in [-2, 2] (default 0)",
    "logit_bias": "add VALUE, in [-100, 100], to the logit of token ID; may be given several times",
    "seed": "makes draws repeatable (default: drawn anew)",
    "n": "completions of each prompt, 1 to 64 (default 1)",
    "stop": "end the text before this string; may be given several times",
    "include_stop_str_in_output": "end it after the string instead",
    "stop_token_ids": "also end at these ids, separated by commas",
    "ignore_eos": "do not end where the model says so",
    "logprobs": "each token's logprob, and the K most likely with theirs, 0 to 20",
    "prompt_logprobs": "the same for the prompt's tokens",
    "detokenize": "return text (default yes)",
    "skip_special_tokens": "leave special tokens out of the text (default yes)",
}
_INTEGERS = frozenset({"max_tokens", "min_tokens", "top_k", "seed", "n", "logprobs", "prompt_logprobs"})
_SWITCHES = frozenset({"include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"})
_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams) if field.init)
_PREFIX = "sampling_"


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a field, in a group of their own."""
    title = "sampling"
    about = "What is left out is the model's own choice (generation_config.json), or else the default named here."
    group = parser.add_argument_group(title, about)
    for name in _NAMES:
        group.add_argument(f"--{name.replace('_', '-')}", dest=_PREFIX + name, help=_HELP[name], **_form(name))


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The parameters with exactly the fields whose flags were given.

    Raises:
        RequestError: a value is out of range.
    """
    given = {name: value for name in _NAMES if (value := getattr(args, _PREFIX + name)) is not None}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return SamplingParams(**given)


def token_ids(text: str) -> list[int]:
    """The ids in ``"1,2,3"``; for argparse, which shows the error of one that is none."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3") from None


def _form(name: str) -> dict[str, Any]:
    """How argparse reads the flag of a field."""
    if name in _SWITCHES:
        return {"action": argparse.BooleanOptionalAction}
    if name == "stop":
        return {"action": "append", "metavar": "TEXT"}
    if name == "stop_token_ids":
        return {"type": token_ids, "metavar": "ID,ID"}
    if name == "logit_bias":
        return {"type": _bias, "action": "append", "metavar": "ID=VALUE"}
    if name in _INTEGERS:
        return {"type": int, "metavar": "K" if name in ("top_k", "logprobs", "prompt_logprobs") else "N"}
    return {"type": float, "metavar": "X"}


def _bias(text: str) -> tuple[int, float]:
    token_id, equals, value = text.partition("=")
    try:
        if equals:
            return int(token_id), float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not an id and a value such as 42=-1.5")
