"""The demo model's tokenizer spells what it must, and the runtime decodes it with its spaces in place."""

from __future__ import annotations

import pytest

from hkv_jax.tokenizer import Tokenizer
from tools.demo_training import tokenizer, vocabulary

SENTENCE = "The key of Ada's box is 4713."


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("text", [SENTENCE, "What is it? A cat, Zürich's: 12 - 7!", "who", "And of Bora's box?"])
def test_what_is_spelled_is_read_again(runtime: Tokenizer, text: str) -> None:
    known = text.replace("ü", "<unk>")
    assert runtime.decode(runtime.encode(text), skip_special_tokens=False) == f"<bos>{known}"


def test_a_value_is_the_same_tokens_wherever_it_stands(runtime: Tokenizer) -> None:
    ids = [runtime.encode(text, add_special_tokens=False) for text in (" 4713", "It is 4713.", "The key, is 4713")]
    assert ids[1][2:6] == ids[2][-4:] == ids[0]
    assert len(ids[0]) == vocabulary.VALUE_DIGITS


def test_every_name_is_two_tokens(runtime: Tokenizer) -> None:
    for held_out in (False, True):
        for name in vocabulary.names(held_out=held_out):
            assert len(runtime.encode(f" {name}", add_special_tokens=False)) == 2


def test_no_name_or_value_is_both_trained_and_held_out() -> None:
    for kept in (vocabulary.names, vocabulary.values):
        held, trained = set(kept(held_out=True)), set(kept(held_out=False))
        assert held
        assert not held & trained
        assert len(held) < len(trained) / 3


def test_a_chat_is_what_the_model_was_trained_on(runtime: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": f"{SENTENCE} What is the key of Ada's box?"},
        {"role": "assistant", "content": SENTENCE},
        {"role": "user", "content": " And of Bora's box? "},
    ]
    assert runtime.render_chat(messages) == (
        f"<bos><user>{SENTENCE} What is the key of Ada's box?<end><model>{SENTENCE}<end>"
        "<user>And of Bora's box?<end><model>"
    )


def test_the_encoder_of_words_is_the_tokenizer(runtime: Tokenizer) -> None:
    encoder = tokenizer.WordEncoder()
    for text in (SENTENCE, f" {SENTENCE} Adaq's x-ray", "4713"):
        assert encoder.encode(text) == runtime.encode(text, add_special_tokens=False)
