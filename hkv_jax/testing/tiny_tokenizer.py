"""A small tokenizer of each kind, as files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

BOS, EOS, TURN = "<s>", "</s>", "<|turn|>"
"""Special tokens of the tiny tokenizers; ids 0, 1 and 2."""

WORDS = ("the", "cat", "sat", "on", "mat", "hello", "world")


def byte_level_tokenizer() -> Tokenizer:
    """GPT-2's kind: every byte is a token, and some words with a leading space are; ``bos`` comes first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((BOS, EOS, TURN, *alphabet))}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        joined = "Ġ"
        for letter in word:
            if joined + letter not in vocabulary:
                merges.append((joined, letter))
                vocabulary[joined + letter] = len(vocabulary)
            joined += letter
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer)


def byte_fallback_tokenizer(*, strips: bool = True) -> Tokenizer:
    """SentencePiece's kind: words with ``▁`` for a space, letters, and bytes such as ``<0xE4>`` for everything else.

    ``strips``: the decoder drops the space at the start of a text, as Llama 2's does and Gemma's does not.
    """
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,!日"]
    pieces = [BOS, EOS, TURN, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {token: index for index, token in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        joined = "▁"
        for letter in word:
            if joined + letter not in vocabulary:
                merges.append((joined, letter))
                vocabulary[joined + letter] = len(vocabulary)
            joined += letter
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)  # noqa: S106
    )
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(steps)
    return _finished(tokenizer)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, *, chat_template: str | None = None) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` as a model folder has them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {"bos_token": BOS, "eos_token": {"content": EOS, "special": True}}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _finished(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (BOS, EOS, TURN)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer
