"""The options of the server, beside those of the engine: Python keyword, flag and TOML key alike.

Owns: their names, values and help. Must never: open anything.
"""

from __future__ import annotations

import dataclasses
import re

from hkv_jax.config import Option, option, options_of, settle
from hkv_jax.config.option_kinds import NotAcceptedError, OptionKind

_WHOLE = re.compile(r"[0-9]{1,9}", re.ASCII)
_HOST = re.compile(r"[0-9A-Za-z_.:%-]+", re.ASCII)
_MAX_PORT = 65535
_MAX_DRAIN_SECONDS = 86_400


def _host(value: object) -> str:
    if not isinstance(value, str) or not _HOST.fullmatch(value):
        raise NotAcceptedError
    return value


def _whole_number(high: int) -> OptionKind:
    def parse(value: object) -> int:
        if isinstance(value, str) and _WHOLE.fullmatch(value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
            raise NotAcceptedError
        return value

    return OptionKind(parse, f"an integer from 0 to {high}", "N")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where a server listens, and how it ends.

    Raises:
        ConfigError: a value is not accepted; the message says what is.
    """

    host: str = option(
        OptionKind(_host, "a host name or an IP address, such as 0.0.0.0", "HOST"),
        "Address to listen on. The default is reachable from this machine only; 0.0.0.0 is all of its addresses. "
        "The connection is not encrypted and asks nobody who they are.",
        default="127.0.0.1",
    )
    port: int = option(
        _whole_number(_MAX_PORT), "Port to listen on; 0 is any that is free, printed at start.", default=50051
    )
    drain_seconds: int = option(
        _whole_number(_MAX_DRAIN_SECONDS),
        "How long requests that live may go on after SIGTERM or Ctrl-C; then they are cut off.",
        default=20,
    )

    def __post_init__(self) -> None:
        settle(self)


def server_options() -> tuple[Option, ...]:
    """Every option of the server, in the order they are best read."""
    return options_of(ServerOptions)
