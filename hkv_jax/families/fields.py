"""Reading JSON files of a model folder, and their fields, strictly.

Owns: what counts as an integer, a number, a flag; the words of every refusal; which fields nobody read. Must never:
know a model family, or take one kind of value for another (``true`` is no integer, ``"32"`` is no number).
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from hkv_jax.errors import ConfigError

MAX_JSON_BYTES = 64 * 2**20
MAX_COUNT = 2**31 - 1
MAX_SHOWN = 120


def read_json_object(path: Path) -> dict[str, object]:
    """The object of a JSON file.

    Raises:
        ConfigError: the file cannot be read, is too large, or is no JSON object with finite numbers and distinct keys.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ConfigError(f"{path}: {size} bytes are too many for this file; at most {MAX_JSON_BYTES} are read")
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold one JSON object, holds a {type(value).__name__}")
    return value


def parse_json(data: bytes) -> object:
    """Parses UTF-8 JSON without NaN, Infinity, repeated keys or bottomless nesting.

    Raises:
        ValueError: it is something else.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(key for key, _ in pairs if sum(other == key for other, _ in pairs) > 1)
        raise ValueError(f"the key {shown(repeated)} is there twice")
    return found


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def shown(value: object) -> str:
    """``value`` for a message, cut to a readable length."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 60
    text = brief.repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


class Fields:
    """The fields of one JSON object, each read once or more with the type it must have.

    ``where`` begins every message. A field that is absent takes the default of the caller; ``null`` is a value of its
    own, allowed only in the ``optional_`` readers. What no one has read is in ``unread``.
    """

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self._values = dict(values)
        self._read: set[str] = set()
        self.where = where

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def raw(self, name: str, default: object = None) -> object:
        """The value as it stands, ``default`` if there is none."""
        self._read.add(name)
        return self._values.get(name, default)

    def unread(self) -> dict[str, object]:
        """Fields that nobody asked for."""
        return {name: value for name, value in self._values.items() if name not in self._read}

    def error(self, name: str, accepted: str) -> ConfigError:
        """The refusal of the value of a field, to be raised."""
        return ConfigError(f"{self.where}: {name} is {shown(self._values.get(name))}; accepted: {accepted}")

    def count(self, name: str, default: int, high: int = MAX_COUNT) -> int:
        """A positive integer of at most ``high``."""
        value = self.raw(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
            raise self.error(name, f"an integer from 1 to {high}")
        return value

    def optional_count(self, name: str, default: int | None) -> int | None:
        """A positive integer, or null."""
        return None if self.raw(name, default) is None else self.count(name, default or 1)

    def number(self, name: str, default: float | None) -> float:
        """A finite number above 0; without a default it must be there."""
        value = self.raw(name, default)
        if not is_positive_number(value):
            raise self.error(name, "a number above 0")
        return float(value)  # type: ignore[arg-type]

    def optional_number(self, name: str, default: float | None) -> float | None:
        """A finite number above 0, or null."""
        return None if self.raw(name, default) is None else self.number(name, default)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def choice(self, name: str, default: str, accepted: Iterable[str]) -> str:
        """One of some words."""
        value = self.raw(name, default)
        accepted = list(accepted)
        if not isinstance(value, str) or value not in accepted:
            raise self.error(name, ", ".join(accepted))
        return value

    def token_ids(self, name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """An id or a list of ids, without repetition; null is none."""
        value = self.raw(name, default)
        ids = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
        if any(not isinstance(one, int) or isinstance(one, bool) for one in ids):
            raise self.error(name, "a token id, a list of token ids, or null")
        return tuple(dict.fromkeys(ids))

    def mapping(self, name: str) -> dict[str, object] | None:
        """An object; null and absent are ``None``."""
        value = self.raw(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "an object or null")
        return value


def is_positive_number(value: object) -> bool:
    """Whether it is a finite number above 0, and no boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
