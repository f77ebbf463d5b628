"""The command line in process, on an engine whose device is fake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hkv_jax.engine.open_model
import hkv_jax.llm
from hkv_jax.config import EngineConfig
from hkv_jax.errors import CheckpointError, EngineStoppedError
from hkv_jax.llm import Prompt
from hkv_jax.outputs import Completion, FinishReason, PrefixHit, RequestOutput, TokenLogprob, Usage
from hkv_jax.sampling_params import SamplingParams
from serving.cli import main
from serving.commands.generate import json_lines


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(hkv_jax.llm, "LLM", fail)


def test_the_json_of_a_completion() -> None:
    shown = TokenLogprob(3681, -0.25, ((3681, -0.25),))
    france = Completion(0, " Paris é", (3681, 2), (shown, TokenLogprob(2, -1.5)), FinishReason.STOP, 2)
    plain = Completion(1, "x", (4,), None, FinishReason.LENGTH)
    outputs = [
        RequestOutput("a", (1, 2), (france, plain), Usage(9, 3)),
        RequestOutput("b", (1,), (plain,), Usage(1, 1, 1, PrefixHit.REBUILD, 2), (TokenLogprob(1, None),)),
    ]
    assert json_lines(outputs) == [
        (
            '{"index": 0, "sample": 0, "text": " Paris é", "token_ids": [3681, 2], "logprobs": '
            '[{"token_id": 3681, "logprob": -0.25, "top": [{"token_id": 3681, "logprob": -0.25}]}, '
            '{"token_id": 2, "logprob": -1.5, "top": []}], "finish_reason": "stop", "stop_reason": 2, '
            '"usage": {"prompt_tokens": 9, "completion_tokens": 3, "cached_tokens": 0, '
            '"prefix_hit": "miss", "rebuilt_tokens": 0}}'
        ),
        (
            '{"index": 0, "sample": 1, "text": "x", "token_ids": [4], "logprobs": null, "finish_reason": "length", '
            '"stop_reason": null, "usage": {"prompt_tokens": 9, "completion_tokens": 3, "cached_tokens": 0, '
            '"prefix_hit": "miss", "rebuilt_tokens": 0}}'
        ),
        (
            '{"index": 1, "sample": 1, "text": "x", "token_ids": [4], "logprobs": null, "finish_reason": "length", '
            '"stop_reason": null, "usage": {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 1, '
            '"prefix_hit": "rebuild", "rebuilt_tokens": 2}, '
            '"prompt_logprobs": [{"token_id": 1, "logprob": null, "top": []}]}'
        ),
    ]


def test_generate_keeps_the_order_of_prompts_and_stdout_clean(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["--prompt", "the cat", "--prompt-token-ids", "5,6,7", "--prompt", "hello"]
    flags = ["--model", str(model), "--max-tokens", "9", "--seed", "3", "--n", "2", "--ignore-eos"]
    assert main(["generate", *prompts, *flags, "--json"]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["index"], line["sample"]) for line in lines] == [(i, s) for i in range(3) for s in range(2)]
    with hkv_jax.llm.LLM(model) as llm:
        same: list[Prompt] = ["the cat", [5, 6, 7], "hello"]
        expected = llm.generate(same, SamplingParams(max_tokens=9, seed=3, n=2, ignore_eos=True))
    assert [json.loads(line) for line in json_lines(expected)] == lines
    assert "global" in err
    assert "sliding" in err
    assert "sequences of" in err


def test_generate_for_people(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(model), "--max-tokens", "9", "--seed", "3", "--ignore-eos"]
    with hkv_jax.llm.LLM(model) as llm:
        expected = llm.generate("the cat", SamplingParams(max_tokens=9, seed=3, ignore_eos=True))[0].outputs[0]
    assert main(["generate", "--prompt", "the cat", *flags]) == 0
    assert capsys.readouterr().out == expected.text + "\n"
    assert main(["generate", "--prompt", "the cat", *flags, "--no-detokenize"]) == 0
    assert capsys.readouterr().out.split() == [str(token_id) for token_id in expected.token_ids]
    assert main(["generate", "--prompt", "the cat", *flags, "--prompt", "the cat"]) == 0
    out = capsys.readouterr().out
    assert out.count(expected.text) == 2
    assert "--- prompt 1, sample 0 (length)" in out


def test_every_sampling_flag_reaches_the_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SamplingParams] = []

    def spy(self: Any, prompts: object, params: SamplingParams) -> list[RequestOutput]:
        seen.append(params)
        return []

    monkeypatch.setattr(hkv_jax.llm.LLM.func, "generate", spy)  # type: ignore[attr-defined]
    flags = (
        "--max-tokens 9 --min-tokens 3 --temperature 0.7 --top-k 4 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 "
        "--presence-penalty -0.5 --frequency-penalty 0.5 --logit-bias 3=-1.5 --logit-bias 0=100 --seed 7 --n 2 "
        "--stop a --stop b --include-stop-str-in-output --stop-token-ids 1,2 --ignore-eos --logprobs 0 "
        "--prompt-logprobs 20 --detokenize --no-skip-special-tokens"
    )
    assert main(["generate", "--model", str(model), "--prompt", "a", "--json", *flags.split()]) == 0
    assert seen == [
        SamplingParams(
            max_tokens=9,
            min_tokens=3,
            temperature=0.7,
            top_k=4,
            top_p=0.9,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=-0.5,
            frequency_penalty=0.5,
            logit_bias={3: -1.5, 0: 100.0},
            seed=7,
            n=2,
            stop=("a", "b"),
            include_stop_str_in_output=True,
            stop_token_ids=(1, 2),
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=20,
            detokenize=True,
            skip_special_tokens=False,
        )
    ]
    assert len(seen[0].set_fields) == 20
    assert main(["generate", "--model", str(model), "--prompt", "a", "--json"]) == 0
    assert seen[1].set_fields == frozenset()


def test_a_flag_beats_the_file(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[EngineConfig] = []
    settled = EngineConfig.__post_init__

    def spy(self: EngineConfig) -> None:
        settled(self)
        seen.append(self)

    monkeypatch.setattr(EngineConfig, "__post_init__", spy)
    file = tmp_path / "options.toml"
    lines = (f'model = "{model}"', "max_num_seqs = 3", "max_model_len = 50", "port = 0", "enable_prefix_caching = true")
    file.write_text("\n".join(lines), encoding="utf-8")
    arguments = ["generate", "--config", str(file), "--prompt", "a", "--max-tokens", "1", "--json"]
    assert main([*arguments, "--max-model-len", "60"]) == 0
    assert (seen[-1].max_num_seqs, seen[-1].max_model_len, seen[-1].model) == (3, 60, model)
    assert seen[-1].enable_prefix_caching
    assert main([*arguments, "--no-enable-prefix-caching", "--max-prefix-wait-seconds", "0"]) == 0
    assert (seen[-1].enable_prefix_caching, seen[-1].max_prefix_wait_seconds) == (False, 0.0)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["generate"], "give --prompt"),
        (["generate", "--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "--prompt", "a", "--max-model-len", "0"], "max_model_len is '0'; accepted"),
        (["generate", "--prompt", "a", "--kv-cache-memory", "much"], "kv_cache_memory is 'much'; accepted"),
        (["generate", "--prompt", "a", "--config", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (["generate", "--prompt-token-ids", "5,301"], "vocabulary"),
        (["chat", "--message", "a", "--n", "2"], "--n"),
        (["serve", "--port", "65536"], "port is '65536'; accepted"),
        (["serve", "--host", "a b"], "host is 'a b'; accepted"),
        (["serve", "--max-num-seqs", "9", "--max-num-batched-tokens", "8"], "max_num_seqs"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], what: str
) -> None:
    assert main([*arguments, "--model", str(model)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("hkv-jax: ")
    assert what in last
    assert "Traceback" not in err


@pytest.mark.parametrize("value", ["0", "-5", "abc", "1e3", ""])
def test_a_bad_expected_length_in_the_environment(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("EXPECTED_AVERAGE_SEQ_LENGTH", value)
    assert main(["generate", "--prompt", "a", "--model", str(model)]) == 2
    assert f"EXPECTED_AVERAGE_SEQ_LENGTH is {value!r}; accepted: a positive integer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CheckpointError("no tensor x"), 2, "hkv-jax: no tensor x"),
        (EngineStoppedError("gone"), 1, "hkv-jax: gone"),
        (ZeroDivisionError("a\nb"), 1, "hkv-jax: unexpected ZeroDivisionError: a b (--verbose shows where)"),
        (KeyboardInterrupt(), 130, "hkv-jax: interrupted"),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    failing(monkeypatch, error)
    assert main(["generate", "--prompt", "a"]) == code
    assert capsys.readouterr().err.splitlines() == [line]


@pytest.mark.parametrize("arguments", [["--frobnicate"], ["generate", "--max-tok", "3"], ["serve", "--n", "1"], []])
def test_unknown_flags_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


@pytest.mark.parametrize("arguments", ["--help", "generate --help", "chat --help", "serve --help", "--version"])
def test_help_needs_nothing_heavy(arguments: str) -> None:
    program = (
        "import sys\nfrom serving.cli import main\n"
        f"try:\n    main({arguments.split()!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'jax', 'grpc', 'google', 'tokenizers', 'rich'} & set(sys.modules)\nassert not heavy, heavy"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert ("example" in shown.stdout or "start with" in shown.stdout) == ("--help" in arguments)
    assert "hkv-jax" in shown.stdout
