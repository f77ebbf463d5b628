"""The Python face: prompts of every form, streams, conversations, and a clean end."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hkv_jax import LLM, SamplingParams
from hkv_jax.config import DEMO_MODEL
from hkv_jax.errors import ConfigError, EngineStoppedError, RequestError
from hkv_jax.outputs import FinishReason, RequestOutput
from hkv_jax.testing.fake_engine import FakeEngineConfig, fake_engine
from hkv_jax.testing.fake_model import FAKE_ENGINE, fake_engine_factory, write_fake_model
from hkv_jax.testing.tiny_tokenizer import byte_level_tokenizer

PARAMS = SamplingParams(max_tokens=6, seed=0, ignore_eos=True)
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
CAT = [{"role": "user", "content": "the cat"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_fake_model(tmp_path, chat_template=TEMPLATE)


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, engine_factory=fake_engine_factory()) as opened:
        yield opened


def ids_of(text: str) -> list[int]:
    return byte_level_tokenizer().encode(text).ids


def tokens_of(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("the cat", [ids_of("the cat")]),
        (["the cat", "hello"], [ids_of("the cat"), ids_of("hello")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ((5, 6, 7), [[5, 6, 7]]),
        ([[5, 6, 7], [8]], [[5, 6, 7], [8]]),
        (["the cat", [8, 9]], [ids_of("the cat"), [8, 9]]),
        (np.array([5, 6, 7]), [[5, 6, 7]]),
        (np.array([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        ([], []),
    ],
)
def test_prompts_of_every_form(llm: LLM, prompts: Any, expected: list[list[int]]) -> None:
    outputs = llm.generate(prompts, PARAMS)
    assert [list(output.prompt_token_ids) for output in outputs] == expected
    assert all(output.usage.completion_tokens == 6 for output in outputs)
    # In the order of the prompts, whatever ran when.
    assert outputs == [with_id(llm.generate(ids, PARAMS)[0], outputs[i]) for i, ids in enumerate(expected)]


def with_id(output: RequestOutput, other: RequestOutput) -> RequestOutput:
    """``output`` under the id of ``other``."""
    return RequestOutput(other.request_id, output.prompt_token_ids, output.outputs, output.usage)


def test_params_for_each_prompt(llm: LLM) -> None:
    each = [PARAMS.replace(max_tokens=1), PARAMS.replace(max_tokens=2, n=3), PARAMS.replace(max_tokens=3, logprobs=0)]
    outputs = llm.generate(["the", "cat", "sat"], each)
    assert [output.usage.completion_tokens for output in outputs] == [1, 6, 3]
    assert [len(output.outputs) for output in outputs] == [1, 3, 1]
    assert [output.outputs[0].logprobs is None for output in outputs] == [True, True, False]


def test_many_more_prompts_than_can_run_at_once(llm: LLM) -> None:
    outputs = llm.generate([[token_id] for token_id in range(3, 53)], PARAMS)
    assert [output.prompt_token_ids[0] for output in outputs] == list(range(3, 53))
    assert llm.stats().num_finished_requests == 50


def test_a_plot_shows_every_pool(llm: LLM) -> None:
    pytest.importorskip("matplotlib")
    llm.generate("the cat", PARAMS)
    memory, sequences, _ = llm.plot().axes
    legend = memory.get_legend()
    assert legend is not None
    assert {text.get_text().partition(":")[0] for text in legend.get_texts()} == {"global", "sliding"}
    assert sequences.get_ylim()[1] > 1


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["the", ""], PARAMS, None),  # bos alone is a prompt
        (["the", []], PARAMS, r"^prompts\[1\]: the prompt has 0 tokens"),
        ([[5], [10**6]], PARAMS, r"^prompts\[1\]: the prompt holds an id outside the vocabulary"),
        ([[5] * 500], PARAMS, r"^the prompt has 500 tokens; max_model_len 128"),
        (["the", 5], PARAMS, r"^prompts\[1\]: a prompt that is not text must be a list of token ids"),
        ([[1.5]], PARAMS, "must be a list of token ids, which are integers"),
        (b"the", PARAMS, "a prompt is text or a list of token ids, not bytes"),
        (["the", "cat"], [PARAMS], "params has 1 entries for 2 prompts"),
    ],
)
def test_a_bad_prompt_is_named_and_nothing_is_run(llm: LLM, prompts: Any, params: Any, message: str | None) -> None:
    if message is None:
        assert len(llm.generate(prompts, params)) == len(prompts)
        return
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, params)
    llm.close()
    assert llm.stats().num_requests == 0


def test_a_stream_is_the_output_in_pieces(llm: LLM) -> None:
    (output,) = llm.generate("the cat", PARAMS)
    deltas = list(llm.stream("the cat", PARAMS))
    assert "".join(delta.completion.text for delta in deltas) == output.outputs[0].text
    assert deltas[-1].usage == output.usage


def test_leaving_a_stream_aborts_it(llm: LLM) -> None:
    stream = llm.stream([5, 6, 7], PARAMS.replace(max_tokens=100, n=8))
    next(stream)
    stream.close()
    assert llm.generate([5], PARAMS)
    assert llm.stats().num_output_tokens < 800


def test_a_stream_refuses_when_it_starts(llm: LLM) -> None:
    stream = llm.stream([])
    with pytest.raises(RequestError, match="0 tokens"):
        next(stream)


def test_chat_uses_the_models_template(llm: LLM) -> None:
    (output,) = llm.chat(CAT, PARAMS)
    assert byte_level_tokenizer().decode(list(output.prompt_token_ids), skip_special_tokens=False) == (
        "<s>user the cat</s>"
    )
    both = llm.chat([CAT, [{"role": "user", "content": "hello"}]], PARAMS)
    assert tokens_of(both)[0] == output.outputs[0].token_ids
    assert len(both) == 2


@pytest.mark.parametrize("messages", [[], "the cat", [["the cat"]]])
def test_chat_refuses_what_is_no_conversation(llm: LLM, messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        llm.chat(messages)


def test_a_base_model_does_not_chat(tmp_path: Path) -> None:
    with LLM(write_fake_model(tmp_path), engine_factory=fake_engine_factory()) as llm:
        with pytest.raises(RequestError, match="no chat template"):
            llm.chat(CAT)
        assert llm.generate("the", PARAMS)


@pytest.mark.parametrize("source", ["model", "neutral"])
def test_unset_parameters_take_the_models_values(folder: Path, source: str) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 5, "max_new_tokens": 4}))
    with LLM(folder, engine_factory=fake_engine_factory(), generation_config=source) as llm:
        params = llm.default_sampling_params(temperature=0.5)
        assert (params.temperature, params.top_k, params.max_tokens) == (
            (0.5, 5, 4) if source == "model" else (0.5, 0, None)
        )
        num_tokens = llm.generate("the", SamplingParams(ignore_eos=True))[0].usage.completion_tokens
        assert num_tokens == (4 if source == "model" else 128 - len(ids_of("the")))


def test_it_works_in_a_running_event_loop(llm: LLM) -> None:
    async def cell() -> list[RequestOutput]:
        streamed = list(llm.stream("the cat", PARAMS))
        assert streamed[-1].completion.finish_reason is FinishReason.LENGTH
        return llm.generate("the cat", PARAMS)

    assert len(asyncio.run(cell())[0].outputs[0].token_ids) == 6


def test_progress_goes_to_stderr_and_only_when_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LLM(folder, engine_factory=fake_engine_factory()) as llm:
        llm.generate(["the", "cat"], PARAMS)
        assert capsys.readouterr() == ("", "")  # no terminal
        llm.generate(["the", "cat"], PARAMS, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "generating" in err
    assert "2/2" in err
    assert "12 tokens" in err


def test_getting_ready_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[bool] = []

    def factory(config: Any, progress: Any) -> Any:
        seen.append(progress is not None)
        return fake_engine_factory()(config, progress)

    for asked in (True, False, None):
        LLM(folder, engine_factory=factory, progress=asked).close()
    assert seen == [True, False, False]
    assert capsys.readouterr().out == ""


def test_closed_twice_and_used_after(folder: Path) -> None:
    llm = LLM(folder, engine_factory=fake_engine_factory())
    llm.generate("the", PARAMS)
    llm.close()
    llm.close()
    with pytest.raises(EngineStoppedError):
        llm.generate("the", PARAMS)
    with pytest.raises(EngineStoppedError):
        next(llm.stream("the", PARAMS))
    with pytest.raises(EngineStoppedError):
        llm.chat(CAT, PARAMS)
    assert llm.stats().num_finished_requests == 1


def counted(engines: list[weakref.ref[Any]]) -> Any:
    """A factory whose engines can be seen to go."""

    def make(config: FakeEngineConfig) -> Any:
        engine = fake_engine(config)
        engines.append(weakref.ref(engine))
        return engine

    return fake_engine_factory(FAKE_ENGINE, make)


@pytest.mark.parametrize("how", ["close", "garbage"])
def test_the_engine_is_freed(folder: Path, how: str) -> None:
    engines: list[weakref.ref[Any]] = []
    llm = LLM(folder, engine_factory=counted(engines))
    llm.generate("the", PARAMS)
    if how == "close":
        llm.close()
    else:
        del llm
        gc.collect()
    assert engines[0]() is None


def test_what_is_wrong_with_the_options_is_said_before_anything_is_loaded(folder: Path) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("loaded")

    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(folder, engine_factory=never, max_model_length=5)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        LLM(folder, engine_factory=never)


def run_script(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_ctrl_c_aborts_the_requests_and_leaves_the_model_usable(folder: Path) -> None:
    result = run_script(
        folder,
        """
        import os, signal, sys, threading
        from hkv_jax import LLM, SamplingParams
        from hkv_jax.testing.fake_model import fake_engine_factory
        from hkv_jax.testing.stepped_engine import SteppedEngine

        # Commands that a shell runs in the background are started without it, and so would the test be.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        engine = None
        def make(config):
            global engine
            engine = SteppedEngine(config)
            return engine

        def interrupt():
            engine.run(3)
            os.kill(os.getpid(), signal.SIGINT)

        llm = LLM(sys.argv[1], engine_factory=fake_engine_factory(make_engine=make))
        for attempt in (lambda: llm.generate(["the", "cat"]), lambda: list(llm.stream("the"))):
            thread = threading.Thread(target=interrupt)
            thread.start()
            try:
                attempt()
                print("not interrupted")
            except KeyboardInterrupt:
                print("interrupted")
            thread.join()
        engine.run_freely()
        output, = llm.generate("the", SamplingParams(max_tokens=3, ignore_eos=True))
        print(output.usage.completion_tokens)
        llm.close()
        print(engine.used_blocks, llm.stats().num_requests)
        """,
    )
    assert (result.stdout.split("\n"), result.stderr) == (["interrupted", "interrupted", "3", "0 0", ""], "")


def test_a_script_that_never_closes_ends_all_the_same(folder: Path) -> None:
    result = run_script(
        folder,
        """
        import sys
        from hkv_jax import LLM, SamplingParams
        from hkv_jax.testing.fake_model import fake_engine_factory

        llm = LLM(sys.argv[1], engine_factory=fake_engine_factory())
        stream = llm.stream("the", SamplingParams(max_tokens=100))
        next(stream)
        print("done")
        """,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_importing_loads_nothing_heavy(folder: Path) -> None:
    result = run_script(
        folder,
        "import sys; from hkv_jax import LLM; print({'jax', 'flax', 'grpc', 'rich', 'tokenizers'} & set(sys.modules))",
    )
    assert (result.stdout, result.stderr) == ("set()\n", "")


def test_the_bundled_model_has_three_names() -> None:
    for opened in (LLM.demo, LLM, partial(LLM, "demo")):
        with opened(engine_factory=fake_engine_factory()) as llm:
            assert llm.config.model == DEMO_MODEL
            assert llm.tokenizer.has_chat_template
