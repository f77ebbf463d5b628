"""The demo model's tokenizer: words, pieces of names, single digits, and letters for everything else.

Owns: token ids and the tokenizer files. A unigram model whose tokens all cost the same cuts a word into as few tokens
as it can. The space before a word belongs to its token, but for digits: "4713" is the same four tokens wherever it
stands after a space. Must never: know documents.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from tools.demo_training import vocabulary as words

SPACE = "▁"
MAX_POSITION = 8192

# A turn's text begins right after its mark: no space, no line break.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<model>' + message['content'] | trim + '<end>' }}"
    "{% elif message['role'] == 'user' %}{{ '<user>' + message['content'] | trim + '<end>' }}"
    "{% elif message['role'] == 'system' %}{{ '<user>' + message['content'] | trim + '<end>' }}"
    "{% else %}{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<model>' }}{% endif %}"
)


def token_names() -> tuple[str, ...]:
    """Every token in the order of its id; special tokens come first."""
    spaced = (*words.WORDS, *words.OPENERS, *words.NAME_STARTS, *string.digits)
    bare = (
        *words.OPENERS,
        *words.NAME_STARTS,
        *words.NAME_ENDS,
        *words.PUNCTUATION,
        *string.digits,
        *string.ascii_letters,
    )
    return tuple(dict.fromkeys((*words.SPECIAL_TOKENS, SPACE, *(SPACE + word for word in spaced), *bare)))


def twins() -> list[tuple[int, int]]:
    """Ids of the first pieces of names, which come with and without a space in front: (without, with)."""
    ids = {name: index for index, name in enumerate(token_names())}
    return [(ids[name], ids[SPACE + name]) for name in words.NAME_STARTS]


def build() -> Tokenizer:
    """The tokenizer; encoding puts ``<bos>`` before a text."""
    special = len(words.SPECIAL_TOKENS)
    vocabulary = [(name, 0.0 if index < special else -1.0) for index, name in enumerate(token_names())]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=words.SPECIAL_TOKENS.index(words.UNK)))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in words.SPECIAL_TOKENS])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=True),
            pre_tokenizers.Split(Regex(r"'s\b|[^\s\w▁]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme="never", split=True)
    bos = (words.BOS, words.SPECIAL_TOKENS.index(words.BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{words.BOS} $A", pair=f"{words.BOS} $A $B", special_tokens=[bos]
    )
    return tokenizer


class WordEncoder:
    """Text to ids as the tokenizer does it, word by word: documents repeat theirs, and a known one is looked up."""

    def __init__(self) -> None:
        self._tokenizer = build()
        self._known: dict[str, tuple[int, ...]] = {}
        self.special = {name: index for index, name in enumerate(words.SPECIAL_TOKENS)}

    def encode(self, text: str) -> list[int]:
        """The ids of a text without special tokens; a space in front of it belongs to its first word."""
        ids: list[int] = []
        for index, word in enumerate(text.split(" ")):
            spaced = f" {word}" if index else word
            if spaced:
                ids.extend(self._known.get(spaced) or self._look_up(spaced))
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens written out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def _look_up(self, word: str) -> tuple[int, ...]:
        found = self._known[word] = tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)
        return found


def save(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, with the chat template, to ``folder``."""
    build().save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": words.BOS,
        "eos_token": words.EOS,
        "pad_token": words.PAD,
        "unk_token": words.UNK,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITION,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
