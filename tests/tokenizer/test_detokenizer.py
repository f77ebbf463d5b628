"""Text that grows token by token is the text of all tokens, and never ends inside a character."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from hkv_jax.errors import ConfigError
from hkv_jax.testing.tiny_tokenizer import byte_fallback_tokenizer, byte_level_tokenizer, write_tokenizer
from hkv_jax.tokenizer import Detokenizer, Tokenizer
from hkv_jax.tokenizer.token_bytes import DecoderRules, TokenBytes

UNKNOWN_ID = 5000
LIBRARY = byte_level_tokenizer()
FALLBACK = byte_fallback_tokenizer()
IDS = st.lists(st.integers(0, LIBRARY.get_vocab_size() - 1) | st.just(UNKNOWN_ID), max_size=30)
SENTENCE = "the cat sat on the mat, 日本語 🙂é\n\n  hello"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return in_folder(tmp_path_factory.mktemp("byte_level"), LIBRARY)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return in_folder(tmp_path_factory.mktemp("byte_fallback"), FALLBACK)


def in_folder(folder: Path, library: Library) -> Tokenizer:
    write_tokenizer(folder, library)
    return Tokenizer.from_folder(folder)


def pieces_of(tokenizer: Tokenizer, ids: list[int], prompt: tuple[int, ...] = (), *, skip: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip, prompt=prompt)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@given(ids=IDS, skip=st.booleans())
def test_pieces_joined_are_the_librarys_text_whatever_the_bytes(
    byte_level: Tokenizer, ids: list[int], skip: bool
) -> None:
    whole = LIBRARY.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces_of(byte_level, ids, skip=skip)) == whole
    assert byte_level.decode(ids, skip_special_tokens=skip) == whole


@given(ids=IDS, cut=st.integers(0, 30))
def test_a_continuation_is_what_the_whole_text_has_more_than_the_prompt(
    byte_level: Tokenizer, ids: list[int], cut: int
) -> None:
    """The prompt's text ends before a character it does not finish, wherever prompt and continuation meet."""
    prompt, continuation = ids[:cut], ids[cut:]
    if not any(LIBRARY.decode([token_id]) for token_id in prompt):
        prompt, continuation = [], ids
    shown = pieces_of(byte_level, prompt)[:-1]
    assert "".join([*shown, *pieces_of(byte_level, continuation, tuple(prompt))]) == LIBRARY.decode(ids)


@given(text=st.text(alphabet="the cat日語🙂é\n ", max_size=20))
def test_pieces_of_a_text_hold_whole_characters_only(byte_level: Tokenizer, text: str) -> None:
    pieces = pieces_of(byte_level, byte_level.encode(text))
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("strips", [True, False])
@given(text=st.text(alphabet="the cat日語🙂é\n ", max_size=20))
def test_byte_fallback_gives_the_librarys_text(
    tmp_path_factory: pytest.TempPathFactory, strips: bool, text: str
) -> None:
    library = byte_fallback_tokenizer(strips=strips)
    tokenizer = in_folder(tmp_path_factory.mktemp("fallback"), library)
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == library.decode(ids) == text
    assert not any("�" in piece for piece in pieces)


def test_a_broken_byte_does_not_spoil_the_characters_before_it(byte_fallback: Tokenizer) -> None:
    vocabulary = FALLBACK.get_vocab()
    ids = [vocabulary[f"<0x{byte:02X}>"] for byte in "語".encode() + b"\xff"]
    assert pieces_of(byte_fallback, ids) == ["", "", "語", "�", ""]


def test_a_text_never_ends_inside_a_character(byte_level: Tokenizer) -> None:
    ids = LIBRARY.encode("🙂", add_special_tokens=False).ids
    assert pieces_of(byte_level, ids) == ["", "", "", "🙂", ""]
    assert pieces_of(byte_level, ids[:3]) == ["", "", "", "�"]


def test_a_character_begun_by_the_prompt_is_completed(byte_level: Tokenizer) -> None:
    ids = LIBRARY.encode("the 🙂", add_special_tokens=False).ids
    assert pieces_of(byte_level, ids[-1:], tuple(ids[:-1])) == ["🙂", ""]


def test_a_leading_space_goes_at_the_start_of_a_text_and_stays_in_a_continuation(byte_fallback: Tokenizer) -> None:
    bos, *ids = byte_fallback.encode("cat")
    assert pieces_of(byte_fallback, ids) == ["cat", ""]
    assert pieces_of(byte_fallback, ids, (bos,)) == ["cat", ""]  # nothing visible before
    assert pieces_of(byte_fallback, ids, (bos, *ids)) == [" cat", ""]


def test_special_tokens_are_left_out_unless_wanted(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("the<|turn|> cat")
    assert byte_level.decode(ids) == "the cat"
    assert byte_level.decode(ids, skip_special_tokens=False) == "<s>the<|turn|> cat"


@pytest.mark.parametrize(
    ("decoder", "tokens", "text"),
    [
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}, ["▁a", "▁b"], "a b"),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}, ["▁a", "▁b"], " a b"),
        ({"type": "ByteLevel"}, ["Ġa", "日"], " a日"),  # no byte-level token: taken as it is
        ({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]}, ["<0x41>", "<0x4>"], "A<0x4>"),
    ],
)
def test_decoders(decoder: dict, tokens: list[str], text: str) -> None:
    rules = DecoderRules.from_json(decoder)
    parts = [rules.bytes_of(token, first=index == 0) for index, token in enumerate(tokens)]
    assert b"".join(parts).decode() == text


def test_a_text_may_lose_several_spaces() -> None:
    strip = {"type": "Strip", "content": " ", "start": 3, "stop": 0}
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    rules = DecoderRules.from_json({"type": "Sequence", "decoders": [replace, {"type": "Fuse"}, strip]})
    detokenizer = Detokenizer(TokenBytes(rules, ["▁", "▁▁", "▁▁a"].__getitem__), skip_special_tokens=True)
    assert [detokenizer.push(token_id) for token_id in (0, 1, 2, 0)] == ["", "", "  a", " "]


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Replace", "pattern": {"Regex": "x"}, "content": ""},
        {"type": "Strip", "content": "_", "start": 1, "stop": 0},
    ],
)
def test_an_unknown_decoder_is_named(decoder: dict | None) -> None:
    with pytest.raises(ConfigError, match=decoder["type"] if decoder else "no decoder"):
        DecoderRules.from_json(decoder)
