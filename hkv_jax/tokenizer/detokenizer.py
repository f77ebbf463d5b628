"""Text that grows token by token, never cut inside a character.

Owns: the bytes of an unfinished character, and whether the text has begun. Must never: know stop ids or stop strings.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from hkv_jax.tokenizer.token_bytes import TokenBytes

_UTF8 = codecs.getincrementaldecoder("utf-8")
_LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8."""


class Detokenizer:
    """One text. The pieces joined are the text of all the tokens; bytes that are no UTF-8 become U+FFFD.

    A text that continues a prompt keeps a leading space that would be dropped at the start of a text, and completes a
    character that the prompt's last tokens began.
    """

    def __init__(self, token_bytes: TokenBytes, *, skip_special_tokens: bool, prompt: Sequence[int] = ()) -> None:
        """A text that follows the tokens of ``prompt``."""
        self._bytes = token_bytes
        self._skipped = token_bytes.special if skip_special_tokens else frozenset[int]()
        self._decoder = _UTF8("replace")
        self._started = False
        self._num_to_strip = token_bytes.rules.num_stripped
        if any(token_id not in self._skipped and token_bytes[token_id] for token_id in prompt):
            self._started = True
            self._num_to_strip = 0
            self._decoder.decode(self._tail(prompt))

    def push(self, token_id: int) -> str:
        """The text that one more token makes certain: none for a special token left out or half a character."""
        if token_id in self._skipped:
            return ""
        if self._started:
            text = self._decoder.decode(self._bytes[token_id])
        else:
            self._started = True
            text = self._decoder.decode(self._bytes.first(token_id))
        return self._strip(text) if self._num_to_strip and text else text

    def flush(self) -> str:
        """The end of the text: U+FFFD for a character that stays unfinished, else nothing."""
        return self._decoder.decode(b"", True)

    def _tail(self, prompt: Sequence[int]) -> bytes:
        """Enough bytes of the prompt's end to hold any unfinished character."""
        tail = b""
        for token_id in reversed(prompt):
            if token_id not in self._skipped:
                tail = self._bytes[token_id] + tail
            if len(tail) >= _LONGEST_CHARACTER:
                break
        return tail

    def _strip(self, text: str) -> str:
        """Takes leading spaces away, up to ``num_stripped`` of the whole text."""
        num_spaces = min(len(text) - len(text.lstrip(" ")), self._num_to_strip)
        self._num_to_strip = self._num_to_strip - num_spaces if num_spaces == len(text) else 0
        return text[num_spaces:]
