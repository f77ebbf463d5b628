"""The tokenizer of a model folder.

Owns: which files say how text becomes ids and back. Must never: import jax, or load anything before it is needed (the
vocabulary of a large model takes a second to read). A folder without a tokenizer serves token ids all the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hkv_jax.errors import ConfigError, RequestError
from hkv_jax.tokenizer.chat_template import ChatTemplate, read_json
from hkv_jax.tokenizer.detokenizer import Detokenizer
from hkv_jax.tokenizer.token_bytes import DecoderRules, TokenBytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to ids and back, as the model's own ``tokenizer.json`` says.

    Nothing is read before it is needed; ``load`` reads everything now. Safe to use from several threads.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a model folder; whether there is one, ``available`` tells."""
        return cls(Path(folder))

    @property
    def available(self) -> bool:
        """Whether the folder has a ``tokenizer.json``."""
        return (self._folder / _TOKENIZER_FILE).is_file()

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder has a chat template.

        Raises:
            ConfigError: a file that should hold it cannot be read.
        """
        return self._chat_template is not None

    def load(self) -> None:
        """Reads what there is, so that errors come now and the first request does not wait.

        Raises:
            ConfigError: a file is broken.
        """
        if self.available:
            _ = self.token_bytes, self._chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of ``text``, with the ones the model wants around it (``bos``), unless told not to.

        Special tokens written in the text become their ids.

        Raises:
            RequestError: the folder has no tokenizer, or the text is not valid Unicode.
            ConfigError: its file is broken.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the prompt is no valid text: {error.reason} at character {error.start}") from error
        return list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; ids the tokenizer does not know are left out, bytes that are no UTF-8 become U+FFFD.

        Raises:
            RequestError: the folder has no tokenizer.
            ConfigError: its file is broken.
        """
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join([*map(detokenizer.push, token_ids), detokenizer.flush()])

    def detokenizer(self, *, skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> Detokenizer:
        """A text that follows ``prompt`` and grows token by token.

        Raises:
            RequestError: the folder has no tokenizer.
            ConfigError: its file is broken.
        """
        return Detokenizer(self.token_bytes, skip_special_tokens=skip_special_tokens, prompt=prompt)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt text of a conversation, up to the opening of the assistant's turn.

        ``variables`` go to the template; ``add_generation_prompt=False`` leaves the opening out.

        Raises:
            RequestError: the model has no chat template, or the messages are malformed or refused by it.
            ConfigError: the template is broken.
        """
        if self._chat_template is None:
            raise RequestError(
                "the model has no chat template (no chat_template.jinja, none in tokenizer_config.json): it is "
                "probably a base model; give it a prompt to continue instead"
            )
        return self._chat_template.render(messages, **variables)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """The ids of ``render_chat``; the template writes the special tokens itself.

        Raises:
            RequestError: as ``render_chat`` and ``encode``.
            ConfigError: as ``render_chat`` and ``encode``.
        """
        return self.encode(self.render_chat(messages, **variables), add_special_tokens=False)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of every id.

        Raises:
            RequestError: the folder has no tokenizer.
            ConfigError: its file is broken, or has a decoder that is not supported.
        """
        fast = self._fast
        # The decoder's own JSON: reading the file again would take as long as loading it.
        rules = DecoderRules.from_json(json.loads(fast.decoder.__getstate__()) if fast.decoder is not None else None)
        special = {token_id for token_id, token in fast.get_added_tokens_decoder().items() if token.special}
        special.update(
            token_id for text in self._special_tokens.values() if (token_id := fast.token_to_id(text)) is not None
        )
        return TokenBytes(rules, fast.id_to_token, frozenset(special))

    @cached_property
    def _fast(self) -> FastTokenizer:
        from tokenizers import Tokenizer as FastTokenizer

        if not self.available:
            raise RequestError(
                f"the model folder has no {_TOKENIZER_FILE}: give the prompt as token ids and leave detokenize unset"
            )
        try:
            fast = FastTokenizer.from_file(str(self._folder / _TOKENIZER_FILE))
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"{_TOKENIZER_FILE} cannot be read: {error}") from error
        fast.no_truncation()
        fast.no_padding()
        return fast

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        """Name → text of the tokens with a role, from ``tokenizer_config.json``."""
        config = read_json(self._folder / _CONFIG_FILE)
        tokens = {}
        for name in _SPECIAL_TOKEN_NAMES:
            token = config.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                tokens[name] = text
        return tokens

    @cached_property
    def _chat_template(self) -> ChatTemplate | None:
        return ChatTemplate.from_folder(self._folder, self._special_tokens)
