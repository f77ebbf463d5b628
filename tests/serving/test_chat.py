"""Conversations in the terminal, on an engine whose device is fake."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hkv_jax.outputs import Completion, StreamDelta
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.tiny_tokenizer import byte_level_tokenizer, write_tokenizer
from hkv_jax.tokenizer import Tokenizer
from serving.cli import main


def test_chat_remembers_what_was_said(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[dict[str, str]]] = []
    encode_chat = Tokenizer.encode_chat

    def spy(self: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
        asked.append(messages)
        return encode_chat(self, messages)

    monkeypatch.setattr(Tokenizer, "encode_chat", spy)
    flags = ["--model", str(model), "--max-tokens", "5", "--ignore-eos", "--system", "Be brief."]
    assert main(["chat", "--message", "one", "--message", "two", *flags]) == 0
    answers = capsys.readouterr().out
    assert answers.startswith(asked[1][2]["content"])
    assert [[message["role"] for message in messages] for messages in asked] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
    ]


def test_chat_answers_what_is_piped_in(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--model", str(model), "--max-tokens", "5", "--seed", "1", "--ignore-eos"]
    assert main(["chat", "--message", "the cat", *flags]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    assert main(["chat", *flags]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert main(["chat", *flags]) == 2


def test_chat_in_a_terminal(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    typed = iter(["", "hello", "/what", "/reset", "x" * 5000, "the cat", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert main(["chat", "--model", str(model), "--max-tokens", "5", "--ignore-eos"]) == 0
    err = capsys.readouterr().err
    assert "(forgotten)" in err
    assert "max_model_len" in err
    assert next(typed, None) is None


def test_chat_needs_a_template(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(model, byte_level_tokenizer())
    assert main(["chat", "--model", str(model), "--message", "hello"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_ctrl_c_keeps_the_part_of_an_answer_that_was_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.commands.chat import Conversation

    def stream(*_: object) -> Any:
        yield StreamDelta("a", Completion(0, "half", (1,)))
        raise KeyboardInterrupt

    prompts: list[Any] = []
    tokenizer = SimpleNamespace(encode_chat=lambda messages: prompts.append(messages))
    conversation = Conversation(SimpleNamespace(stream=stream, tokenizer=tokenizer), SamplingParams(), None)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            conversation.ask("more")
    assert prompts[1] == [
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "half"},
        {"role": "user", "content": "more"},
    ]
