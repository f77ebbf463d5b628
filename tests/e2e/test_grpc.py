"""A real checkpoint behind `hkv-jax serve`, asked from another process: what users run, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hkv_jax.outputs import FinishReason
from hkv_jax.sampling_params import SamplingParams
from serving.client import AsyncInferenceClient, InferenceClient
from serving.server_process import ServerProcess

pytestmark = pytest.mark.slow

MODEL = Path(__file__).resolve().parents[1] / "golden" / "data" / "gemma3_text"
FLAGS = (
    *("--model", str(MODEL), "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "4"),
    *("--max-num-batched-tokens", "16", "--kv-cache-memory", "1MiB"),
)
GREEDY = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
START_SECONDS = 600.0
STOP_SECONDS = 120.0


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ServerProcess(FLAGS) as server:
        address = server.address(START_SECONDS)
        with InferenceClient(address) as client:
            client.wait_ready(START_SECONDS)
        yield address
        code = server.stop(STOP_SECONDS)
        assert code == 0, server.said
        assert server.said.splitlines()[-1] == "stopped"


@pytest.fixture(scope="module")
def golden() -> list[tuple[list[int], tuple[int, ...]]]:
    """Prompts, from one token to four windows, and the reference's 48 greedy tokens."""
    with np.load(MODEL / "golden.npz") as file:
        count = sum(name.startswith("prompt_") for name in file)
        return [(file[f"prompt_{i}"].tolist(), tuple(file[f"greedy_{i}"].tolist())) for i in range(count)]


def test_streamed_greedy_tokens_are_the_references(
    address: str, golden: list[tuple[list[int], tuple[int, ...]]]
) -> None:
    """More requests than places, chunks of 16 tokens, windows that slide: all at once."""

    async def stream(client: AsyncInferenceClient, prompt: list[int]) -> tuple[int, ...]:
        return tuple([i async for delta in client.generate_stream(prompt, GREEDY) for i in delta.completion.token_ids])

    async def body() -> list[tuple[int, ...]]:
        async with AsyncInferenceClient(address) as client:
            return await asyncio.gather(*(stream(client, prompt) for prompt, _ in golden))

    assert asyncio.run(body()) == [greedy for _, greedy in golden]


def test_unary_greedy_tokens_are_the_references(address: str, golden: list[tuple[list[int], tuple[int, ...]]]) -> None:
    with InferenceClient(address) as client:
        for prompt, greedy in golden:
            result = client.generate(prompt, GREEDY.replace(n=2))
            assert [output.token_ids for output in result.outputs] == [greedy, greedy]
            assert {output.finish_reason for output in result.outputs} == {FinishReason.LENGTH}


def test_the_command_line_says_the_same(golden: list[tuple[list[int], tuple[int, ...]]]) -> None:
    prompts = [flag for prompt, _ in golden for flag in ("--prompt-token-ids", ",".join(map(str, prompt)))]
    sampling = ("--max-tokens", "48", "--temperature", "0", "--ignore-eos", "--json")
    command = [sys.executable, "-m", "serving", "generate", *FLAGS, *prompts, *sampling]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    lines = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [tuple(line["token_ids"]) for line in lines] == [greedy for _, greedy in golden]


def test_leaving_a_stream_and_a_deadline_give_all_blocks_back(address: str) -> None:
    long = SamplingParams(ignore_eos=True, n=8)
    with InferenceClient(address) as client:
        stream = client.generate_stream([5, 6, 7], long)
        next(stream)
        assert client.server_info().running_sequences > 0
        stream.close()
        with contextlib.suppress(TimeoutError):
            client.generate([5, 6, 7], long, timeout=0.05)
        while (info := client.server_info()).running_sequences + info.waiting_sequences:
            pass  # the test run's own limit ends this if it never happens
        assert [pool.used_blocks for pool in info.pools] == [0, 0]


def test_early_release_shows_in_the_servers_figures(address: str) -> None:
    with InferenceClient(address) as client:
        before = {pool.name: pool for pool in client.server_info().pools}
        client.generate([5, 6, 7], GREEDY.replace(max_tokens=100))
        after = {pool.name: pool for pool in client.server_info().pools}
    assert after["sliding"].released_early_blocks > before["sliding"].released_early_blocks
    assert after["global"].released_early_blocks == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_it_gets_ready_ends_it(number: signal.Signals, code: int) -> None:
    with ServerProcess(FLAGS) as server:
        server.address(START_SECONDS)
        assert server.stop(STOP_SECONDS, number) == code, server.said
        assert "Traceback" not in server.said


def test_a_folder_without_a_model_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with ServerProcess(("--model", str(tmp_path))) as server:
        assert server.wait(STOP_SECONDS) == 2
    last = server.said.splitlines()[-1]
    assert last.startswith("hkv-jax: ")
    assert "config.json" in last
    assert "Traceback" not in server.said
