"""The tokenizer of a model folder: encoding as the library does, and clear words where something is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hkv_jax.errors import ConfigError, RequestError
from hkv_jax.testing.tiny_tokenizer import BOS, byte_level_tokenizer, write_tokenizer
from hkv_jax.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path, byte_level_tokenizer())
    return tmp_path


def test_encode_adds_what_the_model_wants_around_a_text(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    library = byte_level_tokenizer()
    assert tokenizer.available
    assert tokenizer.encode("the cat") == library.encode("the cat").ids
    assert tokenizer.encode("the cat")[0] == library.token_to_id(BOS)
    assert tokenizer.encode("the cat", add_special_tokens=False) == tokenizer.encode("the cat")[1:]


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    library = byte_level_tokenizer()
    library.enable_truncation(2)
    library.enable_padding(length=50)
    write_tokenizer(tmp_path, library)
    assert Tokenizer.from_folder(tmp_path).encode("the cat sat") == byte_level_tokenizer().encode("the cat sat").ids


def test_tokens_with_a_role_are_special_even_where_the_file_does_not_say_so(tmp_path: Path) -> None:
    library = byte_level_tokenizer()
    library.add_tokens(["<end>"])
    write_tokenizer(tmp_path, library)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<end>"}))
    assert Tokenizer.from_folder(tmp_path).decode(library.encode("the<end>").ids) == "the"


def test_a_folder_without_a_tokenizer_says_what_to_do_when_text_is_wanted(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(tmp_path)
    tokenizer.load()
    assert not tokenizer.available
    for attempt in (lambda: tokenizer.encode("x"), lambda: tokenizer.decode([1]), tokenizer.detokenizer):
        with pytest.raises(RequestError, match=r"no tokenizer\.json: give the prompt as token ids"):
            attempt()


@pytest.mark.parametrize("content", ["{", "[]", '{"decoder": {"type": "ByteLevel"}}', '{"version": "1.0"}'])
def test_a_broken_file_is_a_configuration_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path).load()


def test_a_broken_tokenizer_config_is_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer.from_folder(folder).load()


def test_nothing_is_loaded_before_it_is_needed(folder: Path) -> None:
    program = (
        "import sys; from hkv_jax.tokenizer import Tokenizer; tokenizer = Tokenizer.from_folder(sys.argv[1]);"
        "assert tokenizer.available; print({'tokenizers', 'jinja2', 'jax'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, str(folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_text_that_is_no_unicode_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"no valid text: .* at character 2"):
        Tokenizer.from_folder(folder).encode("ab\ud83d")
