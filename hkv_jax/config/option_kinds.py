"""The kinds of value an option can have, read alike from Python, TOML, the command line and the environment.

Owns: what is accepted, and the words for it. Must never: know an option by name.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

MAX_COUNT = 2**31 - 1
MAX_DIGITS = 20
MAX_SECONDS = 86_400
ALL_GROUPS = "all"

_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_MEMORY = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]ib)?", re.ASCII | re.IGNORECASE)
_DECIMAL = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+", re.ASCII)
_COUNT = re.compile(r"[1-9][0-9]*", re.ASCII)
_SWITCH = {"true": True, "false": False}
_NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)


class NotAcceptedError(Exception):
    """A value is of no kind that is accepted; whoever knows the option's name says so to the user."""


@dataclasses.dataclass(frozen=True, slots=True)
class OptionKind:
    """How a value is read.

    Attributes:
        parse: from a value as it came, a string or already of its type, to the value that is used; raises
            ``NotAcceptedError`` if it is neither.
        accepts: what is accepted, to be read after "accepted:".
        metavar: the value's name in the help of the command line; ``None`` for yes or no, which is a pair of flags.
        choices: the words there are, empty where there are too many.
    """

    parse: Callable[[object], object]
    accepts: str
    metavar: str | None
    choices: tuple[str, ...] = ()


def count(high: int = MAX_COUNT, unit: str = "") -> OptionKind:
    """A positive integer, of ``unit`` for the reader."""

    def parse(value: object) -> int:
        number = _count(value)
        if number > high:
            raise NotAcceptedError
        return number

    limit = f" up to {high}" if high != MAX_COUNT else ""
    return OptionKind(parse, f"a positive integer{f' of {unit}' if unit else ''}{limit}, such as 16", "N")


def choice(*words: str) -> OptionKind:
    """One of some words."""

    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise NotAcceptedError
        return value

    return OptionKind(parse, ", ".join(words), "|".join(words), words)


def switch() -> OptionKind:
    """Yes or no."""

    def parse(value: object) -> bool:
        if isinstance(value, str) and value in _SWITCH:
            return _SWITCH[value]
        if not isinstance(value, bool):
            raise NotAcceptedError
        return value

    return OptionKind(parse, "true or false", None)


def memory() -> OptionKind:
    """A number of bytes."""

    def parse(value: object) -> int:
        if not isinstance(value, str):
            return _count(value)
        match = _MEMORY.fullmatch(value)
        if match is None or len(match[1]) > MAX_DIGITS or ("." in match[1] and not match[2]):
            raise NotAcceptedError
        # Exact: 9007199254740993 is no float.
        num_bytes = int(Fraction(match[1]) * _UNITS[(match[2] or "").lower()])
        if not 1 <= num_bytes < 2**63:
            raise NotAcceptedError
        return num_bytes

    return OptionKind(parse, "bytes, as 2GiB, 512MiB or a positive integer", "BYTES")


def fraction() -> OptionKind:
    """A share of something."""

    def parse(value: object) -> float:
        number = _number(value)
        if not 0 < number <= 1:
            raise NotAcceptedError
        return number

    return OptionKind(parse, "a number above 0, at most 1, such as 0.5", "SHARE")


def seconds(*, zero: str = "") -> OptionKind:
    """A length of time; 0 is accepted where ``zero`` says what it means."""

    def parse(value: object) -> float:
        number = _number(value)
        if not (0 < number <= MAX_SECONDS or (zero and number == 0)):
            raise NotAcceptedError
        return number

    also = f", or 0 ({zero})" if zero else ""
    return OptionKind(parse, f"a number of seconds above 0{also}, up to {MAX_SECONDS}, such as 2.5", "SECONDS")


def folder(named: Mapping[str, Path] | None = None) -> OptionKind:
    """A path, or one of the ``named`` folders; whether anything is there is found out when it is opened."""
    names = dict(named or {})

    def parse(value: object) -> Path:
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise NotAcceptedError
        if isinstance(value, str) and value in names:
            return names[value]
        return Path(value).expanduser()

    return OptionKind(parse, " or ".join(("the path of a folder", *names)), "FOLDER")


def block_sizes() -> OptionKind:
    """Tokens per block: one number for all groups, or a number for each of some."""

    def parse(value: object) -> dict[str, int]:
        if isinstance(value, Mapping):
            pairs = list(value.items())
        elif isinstance(value, str) and "=" in value:
            pairs = [_pair(part) for part in value.split(",")]
        else:
            pairs = [(ALL_GROUPS, value)]
        sizes = {name: _count(size) for name, size in pairs if isinstance(name, str) and _NAME.fullmatch(name)}
        if not sizes or len(sizes) < len(pairs) or max(sizes.values()) > MAX_COUNT:
            raise NotAcceptedError
        return sizes

    return OptionKind(parse, "a positive integer, or one for each kind of layer, as global=32,sliding=16", "SIZES")


def _count(value: object) -> int:
    if isinstance(value, str):
        if not _COUNT.fullmatch(value) or len(value) > MAX_DIGITS:
            raise NotAcceptedError
        return int(value)
    if isinstance(value, bool):
        raise NotAcceptedError
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise NotAcceptedError from error
    if number < 1:
        raise NotAcceptedError
    return number


def _number(value: object) -> float:
    if isinstance(value, str):
        if not _DECIMAL.fullmatch(value):
            raise NotAcceptedError
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise NotAcceptedError
    return float(value)


def _pair(part: str) -> tuple[str, str]:
    name, _, size = part.partition("=")
    return name.strip(), size.strip()
