"""An engine whose keys and values are int8: near the floats, the same on every mesh and however a prefix comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hkv_jax.engine.factory import EngineParts
from hkv_jax.engine.request import Request
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.kvcache.format import PageLayout
from hkv_jax.sampling_params import SamplingParams
from tests.engine.tiny_model import TinyModel, tiny_engine

PROMPT = [3 + i * i % 97 for i in range(120)]
PARAMS = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyModel(128, 2, 48, "float32").write(tmp_path_factory.mktemp("model"))


def engine(folder: Path, dtype: str, devices: int = 1, backend: str = "xla", max_num_seqs: int = 1) -> EngineParts:
    options = {"kv_cache_dtype": dtype, "tensor_parallel_size": devices, "kv_cache_memory": 4 * 2**20}
    return tiny_engine(folder, attention_backend=backend, max_num_seqs=max_num_seqs, **options)


@pytest.fixture(scope="module")
def of_floats(folder: Path) -> EngineParts:
    return engine(folder, "float32")


@pytest.fixture(scope="module")
def of_integers(folder: Path) -> EngineParts:
    return engine(folder, "int8")


def generated(parts: EngineParts, prompt: list[int], name: str = "it") -> list[TokenEvent]:
    parts.engine.add(Request.create(name, prompt, PARAMS))
    events: list[TokenEvent] = []
    while parts.engine.has_work:
        events += parts.engine.step()
    return events


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events]


def likelihoods(event: TokenEvent) -> dict[int, float]:
    assert event.logprob is not None
    return dict(event.logprob.top)


def test_logits_are_near_those_of_floats_and_a_cached_prefix_changes_no_token(
    of_floats: EngineParts, of_integers: EngineParts
) -> None:
    floats = generated(of_floats, PROMPT)
    first, again = (generated(of_integers, PROMPT, name) for name in ("first", "again"))
    # The likeliest first tokens are as likely to 0.002; it is 0.03 with values scaled by the scales of keys.
    expected, found = likelihoods(floats[0]), likelihoods(first[0])
    shared = expected.keys() & found.keys()
    assert len(shared) >= 3
    assert 0 < max(abs(expected[token] - found[token]) for token in shared) < 0.004
    prefix = again[0].sequence.first_prefix
    assert prefix is not None and prefix.start > 0
    assert tokens_of(first) == tokens_of(again)


def test_the_same_memory_holds_more(of_floats: EngineParts, of_integers: EngineParts) -> None:
    layouts = [parts.layout for parts in (of_integers, of_floats)]
    assert layouts[0].groups[0].format.layout is PageLayout.PLANES
    integers, floats = (sum(group.num_tokens for group in layout.groups) for layout in layouts)
    # 132 bytes for what floats take 512 for.
    assert integers > 3.5 * floats
    assert all(layout.total_bytes <= 4 * 2**20 for layout in layouts)


def test_two_chips_give_the_tokens_of_one(folder: Path, of_integers: EngineParts) -> None:
    alone, together = (generated(parts, PROMPT[:40]) for parts in (of_integers, engine(folder, "int8", 2)))
    assert tokens_of(together) == tokens_of(alone)


@pytest.mark.slow
def test_the_kernels_give_what_xla_gives(folder: Path, of_integers: EngineParts) -> None:
    of_kernels = engine(folder, "int8", backend="pallas", max_num_seqs=2)
    # Run together: one decodes while the other's chunks are computed. The last begins with a prefix that is cached.
    prompts = {"short": PROMPT[37:4:-1], "long": PROMPT, "again": PROMPT[:110]}
    found: dict[str, list[TokenEvent]] = {name: [] for name in prompts}
    for name, prompt in prompts.items():
        of_kernels.engine.add(Request.create(name, prompt, PARAMS))
    while of_kernels.engine.has_work:
        for event in of_kernels.engine.step():
            found[event.sequence.request.request_id].append(event)
    for name, prompt in prompts.items():
        expected = generated(of_integers, prompt)
        assert tokens_of(found[name]) == tokens_of(expected)
        # Tokens alone would hide much: they repeat, and all are nearly as likely.
        for event, other in zip(found[name], expected, strict=True):
            assert likelihoods(event) == pytest.approx(likelihoods(other), abs=1e-4)
