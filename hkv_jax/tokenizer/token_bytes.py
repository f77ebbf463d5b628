"""Which bytes each token stands for: what makes detokenising one lookup a token.

Owns: reading the decoder of a ``tokenizer.json``. All decoders of the supported families work token by token, but for
one rule about the first token of a text. Must never: keep the state of a text (``Detokenizer`` does).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from hkv_jax.errors import ConfigError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclasses.dataclass(frozen=True, slots=True)
class DecoderRules:
    """What a decoder does to a token.

    ``replacements`` are made in order. ``byte_fallback``: ``<0xE4>`` is that byte. ``byte_level``: each character is a
    byte, by GPT-2's table. The first token of a text loses every ``drop_in_first`` (if not empty), the text then
    ``num_stripped`` spaces at its start.
    """

    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    byte_level: bool = False
    drop_in_first: str = ""
    num_stripped: int = 0

    @classmethod
    def from_json(cls, decoder: Mapping[str, Any] | None) -> DecoderRules:
        """Reads the ``decoder`` of a ``tokenizer.json``.

        Raises:
            ConfigError: a decoder that is not known here; the message names it.
        """
        rules = cls()
        if decoder is None:
            raise ConfigError("tokenizer.json has no decoder; without one tokens cannot be joined to text")
        parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        for part in parts:
            rules = rules._followed_by(part)
        return rules

    def _followed_by(self, part: Mapping[str, Any]) -> DecoderRules:
        kind = part["type"]
        if kind == "Fuse":
            return self
        if kind == "ByteFallback":
            return dataclasses.replace(self, byte_fallback=True)
        if kind == "ByteLevel":
            return dataclasses.replace(self, byte_level=True)
        if kind == "Replace" and "String" in part["pattern"]:
            pair = (part["pattern"]["String"], part["content"])
            return dataclasses.replace(self, replacements=(*self.replacements, pair))
        if kind == "Metaspace":
            mark = part["replacement"]
            first = "" if part.get("prepend_scheme", "always") == "never" else mark
            return dataclasses.replace(self, replacements=(*self.replacements, (mark, " ")), drop_in_first=first)
        if kind == "Strip" and part["content"] == " " and part["stop"] == 0:
            return dataclasses.replace(self, num_stripped=part["start"])
        raise ConfigError(
            f"tokenizer.json has decoder {kind!r} in a form that is not supported; supported are ByteLevel, "
            "Metaspace, and sequences of Replace (of a string), ByteFallback, Fuse and Strip (of leading spaces)"
        )

    def bytes_of(self, token: str, *, first: bool) -> bytes:
        """The bytes of a token, ``first`` in its text or not; spaces to be stripped are still there."""
        if first and self.drop_in_first:
            token = token.replace(self.drop_in_first, "")
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self.byte_level and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        return token.encode("utf-8", "replace")


class TokenBytes:
    """The bytes of every id, looked up once each.

    ``special`` are the ids that ``skip_special_tokens`` leaves out.
    """

    def __init__(
        self, rules: DecoderRules, token_of: Callable[[int], str | None], special: frozenset[int] = frozenset()
    ) -> None:
        """``token_of`` gives the token of an id, ``None`` for one unknown (the model may have rows to spare)."""
        self.rules = rules
        self.special = special
        self._token_of = token_of
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._look_up(token_id, first=False)
        return known

    def first(self, token_id: int) -> bytes:
        """The bytes of the id as the first visible token of a text."""
        return self._look_up(token_id, first=True)

    def _look_up(self, token_id: int, *, first: bool) -> bytes:
        token = self._token_of(token_id)
        return b"" if token is None else self.rules.bytes_of(token, first=first)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for 256, 257, ... in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()
