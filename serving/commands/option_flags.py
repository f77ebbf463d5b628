"""The options of engine and server as flags, and the TOML file that can hold them.

Owns: that a flag beats the file. Must never: read a value itself (the options do, in the same words for every face).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hkv_jax.config import Option, engine_options, read_toml
from serving.server_options import ServerOptions, server_options

_PREFIX = "option_"


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each option of the engine, and ``--config``."""
    _add_flags(parser, "engine", engine_options())
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="TOML file of engine and server options; flags beat it"
    )


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each option of the server."""
    _add_flags(parser, "server", server_options())


def given_engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's options that file and flags set, as they stand there: keywords of ``EngineConfig`` and ``LLM``.

    Raises:
        ConfigError: the file cannot be read, or sets what is no option.
    """
    return _given(args, engine_options())


def server_config(args: argparse.Namespace) -> ServerOptions:
    """The server's options in file and flags.

    Raises:
        ConfigError: as ``given_engine_options``, or a value is not accepted.
    """
    return ServerOptions(**_given(args, server_options()))


def _add_flags(parser: argparse.ArgumentParser, title: str, options: Sequence[Option]) -> None:
    group = parser.add_argument_group(title)
    for one in options:
        text = f"{one.help} (default: {one.default_text})".replace("%", "%%")
        form: dict[str, Any] = {"metavar": one.kind.metavar}
        if one.kind.metavar is None:
            form = {"action": argparse.BooleanOptionalAction}
        group.add_argument(one.flag, dest=_PREFIX + one.name, help=text, **form)


def _given(args: argparse.Namespace, options: Sequence[Option]) -> dict[str, Any]:
    """What file and flags say about these options; a file may set others, which are another command's."""
    in_file: dict[str, Any] = {}
    if args.config is not None:
        in_file = read_toml(args.config, [one.name for one in (*engine_options(), *server_options())])
    given = {one.name: in_file[one.name] for one in options if one.name in in_file}
    for one in options:
        flag = getattr(args, _PREFIX + one.name)
        if flag is not None:
            given[one.name] = flag
    return given
