"""Options as fields of a dataclass: one table from which Python, TOML and the command line are made.

A dataclass of options has a field for each, made by ``option``; ``settle`` in its ``__post_init__`` reads the values.
Owns: that machinery. Must never: know an option by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import reprlib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hkv_jax.config.option_kinds import NotAcceptedError, OptionKind
from hkv_jax.errors import ConfigError

MAX_TOML_BYTES = 2**20
_METADATA = "hkv_jax.option"


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One option, everywhere.

    Attributes:
        name: the Python keyword and the TOML key.
        kind: which values it takes.
        default: the value when it is not set; ``None`` where that depends on others, as ``default_text`` tells.
        default_text: the default in words.
        help: what it is and when to change it.
        environment: a variable that sets it where nothing else does.
    """

    name: str
    kind: OptionKind
    default: object
    default_text: str
    help: str
    environment: str | None = None

    @property
    def flag(self) -> str:
        """The flag on the command line."""
        return "--" + self.name.replace("_", "-")

    def read(self, value: object) -> object:
        """The value to be used; ``None`` is unset.

        Raises:
            ConfigError: it is none of the accepted values.
        """
        name = self.name
        if value is None and self.environment is not None:
            name, value = self.environment, os.environ.get(self.environment)
        if value is None:
            return self.default
        try:
            return self.kind.parse(value)
        except NotAcceptedError as error:
            raise ConfigError(f"{name} is {reprlib.repr(value)}; accepted: {self.kind.accepts}") from error


def option(
    kind: OptionKind, help: str, *, default: object = None, default_text: str = "", environment: str | None = None
) -> Any:
    """A field of a dataclass of options."""
    return dataclasses.field(
        default=None, metadata={_METADATA: (kind, default, default_text or str(default), help, environment)}
    )


def options_of(owner: type) -> tuple[Option, ...]:
    """The options of a dataclass, in the order of its fields."""
    return tuple(
        Option(field.name, *field.metadata[_METADATA])
        for field in dataclasses.fields(owner)
        if _METADATA in field.metadata
    )


def settle(instance: object) -> None:
    """Replaces what was given for each option by the value to be used.

    Raises:
        ConfigError: a value is not accepted.
    """
    for one in options_of(type(instance)):
        object.__setattr__(instance, one.name, one.read(getattr(instance, one.name)))


def check_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Checks that every name is known.

    Raises:
        ConfigError: one is not; the message has the nearest that is.
    """
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"options are {', '.join(known)}"
            raise ConfigError(f"{where}: no option is called {reprlib.repr(name)}; {hint}")


def read_toml(path: Path, known: Iterable[str]) -> dict[str, object]:
    """The options of a TOML file, as they stand there.

    Args:
        path: a file of at most ``MAX_TOML_BYTES``.
        known: names of the options it may set.

    Raises:
        ConfigError: it cannot be read, is no TOML, or sets something else.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOML_BYTES + 1)
        if len(data) > MAX_TOML_BYTES:
            raise ConfigError(f"{path}: too large for a configuration; at most {MAX_TOML_BYTES} bytes are read")
        values = tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error
    check_names(values, known, str(path))
    return values
