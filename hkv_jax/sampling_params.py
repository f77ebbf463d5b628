"""How the tokens of one request are drawn: the options a client may set, and what is wrong with those it set badly.

Owns: names, defaults, ranges and their error messages. Must never: import jax, or know a model (limits that depend on
one, such as the vocabulary, are checked where the model is known: ``SamplingParams.check_for_model``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

from hkv_jax.errors import RequestError

MAX_SAMPLES = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 300
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Options of one request; every field has the meaning vLLM gives it.

    A field that is left out is *unset*: it has the default below until ``with_defaults`` puts the model's value there.
    Change a copy by ``replace``, which keeps the others unset; ``dataclasses.replace`` would set them all.

    Attributes:
        max_tokens: output tokens, at least 1; ``None``: until a stop or the engine's ``max_model_len``.
        min_tokens: stop ids are masked before that many output tokens.
        temperature: 0 is greedy (ties: the lowest id).
        top_k: draw among the k most likely; 0: all.
        top_p: draw from the smallest set whose mass reaches it, in (0, 1].
        min_p: drop tokens less likely than this fraction of the most likely one, in [0, 1].
        repetition_penalty: > 0, over prompt and output.
        presence_penalty, frequency_penalty: in [-2, 2], over output.
        logit_bias: token id → value in [-100, 100], added to the logits; at most 300.
        seed: 0 … 2**63 - 1; ``None``: drawn by the engine. Draws are a function of (seed, sample, output position)
            alone.
        n: samples of one prompt, 1 … 64.
        stop: strings that end the text, at most 16 of at most 1024 characters; the text is cut before the string.
            Looked for once ``min_tokens`` were drawn; needs ``detokenize``.
        include_stop_str_in_output: cut after it instead.
        stop_token_ids: ids that end the output beside the model's own, at most 128.
        ignore_eos: the model's own stop ids do not stop.
        logprobs: 0 … 20: each output token's logprob and the k most likely.
        prompt_logprobs: the same for prompt tokens.
        detokenize: fill ``text``.
        skip_special_tokens: leave special tokens out of ``text``.
        set_fields: names of the fields that were given; makes no difference to equality.

    Raises:
        RequestError: a value is out of range; the message names field, value and range.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    set_fields: frozenset[str] = dataclasses.field(init=False, repr=False, compare=False)

    def __new__(cls, **fields: Any) -> Self:  # noqa: D102 (only it sees which were given)
        params = object.__new__(cls)
        object.__setattr__(params, "set_fields", frozenset(fields))
        return params

    def __post_init__(self) -> None:
        stop: Any = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        self._check_counts()
        self._check_numbers()
        self._check_stops()
        self._check_biases()

    @property
    def has_penalties(self) -> bool:
        """Whether a draw depends on which tokens came before, beyond what the model makes of them."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields set to new values.

        Raises:
            RequestError: a value is out of range, or does not go with the others.
        """
        values = {name: getattr(self, name) for name in self.set_fields}
        return SamplingParams(**{**values, **changes})

    def with_defaults(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """A copy whose unset fields have the values in ``defaults`` (field name → value), where there is one.

        A default for ``max_tokens`` gives way to a larger ``min_tokens`` that was asked for.

        Raises:
            RequestError: a default is out of range, or does not go with a field that is set.
        """
        values = {name: value for name, value in defaults.items() if name not in self.set_fields}
        if values.get("max_tokens") is not None and "min_tokens" in self.set_fields:
            values["max_tokens"] = max(values["max_tokens"], self.min_tokens)
        return self.replace(**values) if values else self

    def check_for_model(self, vocab_size: int) -> None:
        """Checks what depends on the vocabulary.

        Raises:
            RequestError: an id in ``logit_bias`` or ``stop_token_ids`` is not below ``vocab_size``.
        """
        for field, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token_id in ids:
                _require(0 <= token_id < vocab_size, field, token_id, f"ids are 0 to {vocab_size - 1}")

    def _check_counts(self) -> None:
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, None)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_int("top_k", self.top_k, 0, None)
        _check_int("n", self.n, 1, MAX_SAMPLES)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**63 - 1)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)

    def _check_numbers(self) -> None:
        _check_float("temperature", self.temperature, lambda value: value >= 0, "a finite number, at least 0")
        _check_float("top_p", self.top_p, lambda value: 0 < value <= 1, "a number above 0, at most 1")
        _check_float("min_p", self.min_p, lambda value: 0 <= value <= 1, "a number from 0 to 1")
        _check_float("repetition_penalty", self.repetition_penalty, lambda value: value > 0, "a finite number above 0")
        for field in ("presence_penalty", "frequency_penalty"):
            _check_float(field, getattr(self, field), lambda value: abs(value) <= MAX_PENALTY, "a number from -2 to 2")

    def _check_stops(self) -> None:
        _require(len(self.stop) <= MAX_STOP_STRINGS, "stop", len(self.stop), f"at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            _require(isinstance(text, str) and text != "", "stop", text, "non-empty strings")
            limit = f"strings of at most {MAX_STOP_STRING_LENGTH} characters"
            _require(len(text) <= MAX_STOP_STRING_LENGTH, "stop", f"a string of {len(text)}", limit)
        if self.stop and not self.detokenize:
            raise RequestError("stop is set and detokenize is false; stop strings are found in the text only")
        limit = f"at most {MAX_STOP_TOKEN_IDS} ids"
        _require(len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS, "stop_token_ids", len(self.stop_token_ids), limit)
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, None)

    def _check_biases(self) -> None:
        limit = f"at most {MAX_LOGIT_BIASES} entries"
        _require(len(self.logit_bias) <= MAX_LOGIT_BIASES, "logit_bias", len(self.logit_bias), limit)
        for token_id, value in self.logit_bias.items():
            _check_int("logit_bias", token_id, 0, None)
            _check_float("logit_bias", value, lambda bias: abs(bias) <= MAX_LOGIT_BIAS, "numbers from -100 to 100")


def _require(ok: bool, field: str, value: object, allowed: str) -> None:
    if not ok:
        raise RequestError(f"{field} is {value!r}; allowed: {allowed}")


def _check_int(field: str, value: object, low: int, high: int | None) -> None:
    allowed = f"an integer from {low} to {high}" if high is not None else f"an integer, at least {low}"
    _require(isinstance(value, int) and not isinstance(value, bool), field, value, allowed)
    assert isinstance(value, int)
    _require(low <= value and (high is None or value <= high), field, value, allowed)


def _check_float(field: str, value: object, in_range: Callable[[float], bool], allowed: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    _require(number and math.isfinite(value) and in_range(value), field, value, allowed)  # type: ignore[arg-type]
