"""The prefix cache as users meet it: `hkv-jax serve` on a real, tiny checkpoint, asked the same thing again."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hkv_jax.outputs import PrefixHit, Usage
from hkv_jax.sampling_params import SamplingParams
from serving.client import GenerateResult, InferenceClient
from serving.server_process import ServerProcess

pytestmark = pytest.mark.slow

MODEL = Path(__file__).resolve().parents[1] / "golden" / "data" / "gemma3_text"
BLOCK = 32  # of global layers on CPU
FLAGS = (
    *("--model", str(MODEL), "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "4"),
    *("--max-num-batched-tokens", "16", "--kv-cache-memory", "1MiB", "--block-size", f"global={BLOCK}"),
)
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
START_SECONDS = 600.0
STOP_SECONDS = 120.0


@pytest.fixture(scope="module")
def client() -> Iterator[InferenceClient]:
    with ServerProcess(FLAGS) as server, InferenceClient(server.address(START_SECONDS)) as client:
        client.wait_ready(START_SECONDS)
        yield client
        assert server.stop(STOP_SECONDS) == 0, server.said


def tokens(result: GenerateResult) -> list[tuple[int, ...]]:
    return [output.token_ids for output in result.outputs]


def prompt_of(first: int, length: int) -> list[int]:
    """A prompt that begins like no other test's."""
    return [first, *(3 + (7 * position) % 90 for position in range(1, length))]


def test_the_same_prompt_again_is_a_resident_hit_and_the_same_answer(client: InferenceClient) -> None:
    prompt = prompt_of(5, 100)
    cold, warm = client.generate(prompt, GREEDY), client.generate(prompt, GREEDY)
    assert cold.usage == Usage(100, 24)
    assert warm.usage == Usage(100, 24, 3 * BLOCK, PrefixHit.RESIDENT, 0)
    assert tokens(warm) == tokens(cold)


def test_a_prompt_of_whole_blocks_computes_its_last_one_again(client: InferenceClient) -> None:
    prompt = prompt_of(6, 3 * BLOCK)
    cold, warm = client.generate(prompt, GREEDY), client.generate(prompt, GREEDY)
    assert (warm.usage.cached_tokens, warm.usage.prefix_hit) == (2 * BLOCK, PrefixHit.RESIDENT)
    assert tokens(warm) == tokens(cold)


def test_a_conversation_computes_only_what_is_new(client: InferenceClient) -> None:
    """The next turn begins with the prompt and the answer of the turn before."""
    opening = prompt_of(7, 50)
    answer = client.generate(opening, GREEDY).outputs[0].token_ids
    turn = [*opening, *answer, *range(20, 40)]
    *_, last = client.generate_stream(turn, GREEDY)
    assert last.usage is not None
    assert last.usage.prefix_hit is PrefixHit.RESIDENT
    assert last.usage.cached_tokens == (50 + 24 - 1) // BLOCK * BLOCK  # the last token drawn was never computed


def test_samples_share_one_prompt_and_one_report(client: InferenceClient) -> None:
    prompt = prompt_of(8, 100)
    first = client.generate(prompt, GREEDY.replace(n=3))
    again = client.generate(prompt, GREEDY.replace(n=3))
    assert first.usage == Usage(100, 72)
    assert again.usage == Usage(100, 72, 3 * BLOCK, PrefixHit.RESIDENT, 0)
    assert tokens(again) == tokens(first)


def test_prompt_logprobs_are_of_the_whole_prompt_whatever_is_cached(client: InferenceClient) -> None:
    prompt = prompt_of(9, 100)
    params = GREEDY.replace(prompt_logprobs=0)
    cold, warm = client.generate(prompt, params), client.generate(prompt, params)
    assert warm.usage == Usage(100, 24, 0, PrefixHit.MISS, 3 * BLOCK)
    assert cold.prompt_logprobs is not None
    assert warm.prompt_logprobs is not None
    assert len(warm.prompt_logprobs) == 100
    for left, right in zip(cold.prompt_logprobs[1:], warm.prompt_logprobs[1:], strict=True):
        assert left.token_id == right.token_id
        assert left.logprob == pytest.approx(right.logprob, abs=2e-4)
    assert tokens(warm) == tokens(cold)


def test_without_prefix_caching_every_prompt_is_computed_and_nothing_is_kept(client: InferenceClient) -> None:
    prompt = prompt_of(11, 100)
    flags = ("generate", *FLAGS, "--no-enable-prefix-caching", "--json")
    sampling = ("--max-tokens", "24", "--temperature", "0", "--ignore-eos")
    prompts = ("--prompt-token-ids", ",".join(map(str, prompt))) * 2
    command = [sys.executable, "-m", "serving", *flags, *sampling, *prompts]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    lines = [json.loads(line) for line in shown.stdout.splitlines()]
    cold = dataclasses.asdict(Usage(100, 24))
    assert [line["usage"] for line in lines] == [cold, cold]
    expected = client.generate(prompt, GREEDY).outputs[0].token_ids
    assert [tuple(line["token_ids"]) for line in lines] == [expected, expected]


def test_the_server_counts_what_was_saved(client: InferenceClient) -> None:
    before = client.server_info().prefix
    prompt = prompt_of(10, 100)
    client.generate(prompt, GREEDY)
    client.generate(prompt, GREEDY)
    info = client.server_info()
    changes = {hit: count - before.hits[hit] for hit, count in info.prefix.hits.items() if count != before.hits[hit]}
    assert changes == {PrefixHit.MISS: 1, PrefixHit.RESIDENT: 1}
    assert info.prefix.prompt_tokens - before.prompt_tokens == 200
    assert info.prefix.prefix_hit_tokens - before.prefix_hit_tokens == 3 * BLOCK
    assert info.prefix.computed_prompt_tokens - before.computed_prompt_tokens == 200 - 3 * BLOCK
    for pool in info.pools:
        assert pool.used_blocks == 0
        assert pool.cached_blocks > 0
