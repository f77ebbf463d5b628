"""A cached prefix changes nothing: whatever is found, evicted, rebuilt or moved, the numbers are those of a cold run.

Real (tiny, random) Gemma 3 checkpoints in float32, run by the engine's own programs; some with attention sinks, which
no family here has, put into every layer. Every request is compared with the same one on an engine without a past:
logits, greedy tokens, and the K/V that later requests may find.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hkv_jax.kvcache import prefix_cache
from hkv_jax.kvcache.block_table import HOLE
from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.kvcache.prefix_tree import Node
from hkv_jax.kvcache.receptive import receptive_tokens
from hkv_jax.kvcache.token_chain import TokenChain
from hkv_jax.model import transformer
from hkv_jax.outputs import PrefixHit
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing import probe as probe_module
from hkv_jax.testing.probe import Probe, ProbeOptions
from hkv_jax.testing.tail_eviction import evict_tails
from tests.e2e.tiny_models import (
    LAYERS,
    STEP_TOKENS,
    Model,
    options_for,
    receptive,
    tokens,
    write_and_attend_with_sinks,
    write_checkpoint,
)

LOGITS_TOLERANCE, KV_TOLERANCE = 2e-4, 1e-5
GREEDY = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
ONE = GREEDY.replace(max_tokens=1)
MODELS = [
    *(Model(layers, (window,)) for layers in (3, 6) for window in (4, 5, 16, 17)),
    Model(20, (4,)),
    Model(20, (17,)),
    Model(3, (5, 16)),
    Model(6, (4, 5)),
    Model(3, (5,), sinks=True),
    Model(6, (16,), sinks=True),
]
BASE = Model(3, (5,))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("models")
    return {count: write_checkpoint(root / f"{count}", count) for count in LAYERS}


@pytest.fixture
def sinks_if_any(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs compiled with sinks must not be taken for others, nor others for them."""
    model = request.getfixturevalue("model")
    if model.sinks:
        probe_module._compile.cache_clear()
        monkeypatch.setattr(transformer, "write_and_attend", write_and_attend_with_sinks)
    yield
    if model.sinks:
        probe_module._compile.cache_clear()


QUESTION = tokens(5, seed=1)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between a request on an engine that has a past and the same on one that has none.

    Largest errors of a logit and of a cached key or value; whether all tokens are equal; ``tails``: in how many sliding
    groups the whole tail before the prefix was compared.
    """

    logits: float
    kv: float
    same_tokens: bool
    tails: int

    @property
    def is_small(self) -> bool:
        return self.logits <= LOGITS_TOLERANCE and self.kv <= KV_TOLERANCE and self.same_tokens


class Pair:
    """Two engines over the same checkpoint: one with a past, one without."""

    def __init__(self, options: ProbeOptions, chunk: int) -> None:
        self.options, self.chunk = options, chunk
        self.warm, self.cold = Probe(options, chunk), Probe(options, chunk)

    def ask(self, prompt: list[int], matched: int) -> Difference:
        """The same prompt on both; on the cold one it is the first."""
        self.cold = Probe(self.options, self.chunk)
        expected = self.cold.generate({"q": prompt}, GREEDY)["q"]
        found = self.warm.generate({"q": prompt}, GREEDY)["q"]
        end = len(prompt) + len(expected) - 1
        errors = self.warm.logits("q", end, matched) - self.cold.logits("q", end, matched)
        kv, tails = self._compare_cached([*prompt, *expected], matched)
        return Difference(float(np.abs(errors).max()), kv, found == expected, tails)

    def _compare_cached(self, ids: list[int], matched: int) -> tuple[float, int]:
        """Every block that both engines list for these tokens."""
        chain = TokenChain(self.options.block_size)
        chain.append(np.array(ids, np.int32))
        worst, compared = 0.0, set()
        for digest in chain.digests:
            nodes = [probe.cache.prefixes.tree.find(digest) for probe in (self.warm, self.cold)]
            if nodes[0] is not None and nodes[1] is not None:
                for group, number, error in self._compare_nodes(nodes[0], nodes[1]):
                    worst = max(worst, error)
                    compared.add((group, number))
        tails = 0
        for index, layout in enumerate(self.warm.cache.layout.groups):
            if layout.spec.window is not None:
                size = layout.format.block_size
                tail = range((matched - layout.spec.window + 1) // size, matched // size)
                tails += all((index, number) in compared for number in tail)
        return worst, tails

    def _compare_nodes(self, warm: Node, cold: Node) -> Iterator[tuple[int, int, float]]:
        for group, (ours, theirs) in enumerate(zip(warm.blocks, cold.blocks, strict=True)):
            for index, blocks in enumerate(zip(ours, theirs, strict=True)):
                if HOLE not in blocks:
                    found, expected = (
                        probe.keys_values(group, block)
                        for probe, block in zip((self.warm, self.cold), blocks, strict=True)
                    )
                    first = warm.end // self.options.block_size * len(ours) - len(ours)
                    yield group, first + index, float(np.abs(found - expected).max())

    @property
    def num_sliding_groups(self) -> int:
        return sum(group.spec.window is not None for group in self.warm.cache.layout.groups)


@pytest.mark.slow
@pytest.mark.usefixtures("sinks_if_any")
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_a_rebuilt_prefix_is_that_of_a_cold_run(model: Model, folders: dict[int, Path]) -> None:
    options = options_for(model, folders)
    size = options.block_size
    run = -(-receptive(options) // size) * size
    matched = run + 3 * size
    document = tokens(matched)
    for chunk in (STEP_TOKENS, 2 * size + 1):
        pair = Pair(options, chunk)
        pair.warm.generate({"document": [*document, 3]}, ONE)
        evict_tails(pair.warm.cache)
        difference = pair.ask([*document, *QUESTION], matched)
        start = matched - run
        assert pair.warm.prefix_uses["q"] == PrefixUse(start, matched, PrefixHit.REBUILD, start)
        assert difference.is_small, difference
        assert difference.tails == pair.num_sliding_groups
        # What was rebuilt serves the next one, which computes nothing of it.
        difference = pair.ask([*document, *tokens(9, seed=2)], matched)
        assert pair.warm.prefix_uses["q"].hit is PrefixHit.RESIDENT
        assert difference.is_small, difference


@pytest.mark.slow
@pytest.mark.usefixtures("sinks_if_any")
@pytest.mark.parametrize("model", [model for model in MODELS if model.num_sliding < 20], ids=str)
def test_a_window_less_than_the_receptive_length_is_seen(
    model: Model, folders: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_for(model, folders)
    size, short = options.block_size, max(model.windows) - 1
    monkeypatch.setattr(
        prefix_cache, "receptive_tokens", lambda *arguments: (receptive_tokens(*arguments) or 0) - short
    )
    matched = (receptive(options) // size + 4) * size
    pair = Pair(options, STEP_TOKENS)
    pair.warm.generate({"document": [*tokens(matched), 3]}, ONE)
    evict_tails(pair.warm.cache)
    difference = pair.ask([*tokens(matched), *QUESTION], matched)
    assert pair.warm.prefix_uses["q"].hit is PrefixHit.REBUILD
    assert difference.kv > 50 * KV_TOLERANCE, difference
    # Six layers up, little of the error is left in the logits.
    assert difference.logits > LOGITS_TOLERANCE or model.num_sliding > 3, difference


class Scene:
    """The base model and a document of six blocks more than R, whose tails another request has left."""

    def __init__(self, folders: dict[int, Path], chunk: int = STEP_TOKENS, **changes: Any) -> None:
        self.options = dataclasses.replace(options_for(BASE, folders), **changes)
        self.size = self.options.block_size
        self.run = -(-receptive(self.options) // self.size) * self.size
        self.matched = self.run + 6 * self.size
        self.document = tokens(self.matched)
        self.pair = Pair(self.options, chunk)

    def read(self, num_tokens: int) -> None:
        """A request about the first tokens of the document."""
        self.pair.warm.generate({f"first {num_tokens}": [*self.document[:num_tokens], 3]}, ONE)

    def ask(self, num_tokens: int) -> tuple[PrefixUse, Difference]:
        """A question after as much of the document."""
        difference = self.pair.ask([*self.document[:num_tokens], *QUESTION], num_tokens)
        return self.pair.warm.prefix_uses["q"], difference


def test_a_resident_prefix(folders: dict[int, Path]) -> None:
    scene = Scene(folders)
    scene.read(scene.matched)
    use, difference = scene.ask(scene.matched)
    assert use == PrefixUse(scene.matched, scene.matched, PrefixHit.RESIDENT, 0)
    assert difference.is_small, difference


@pytest.mark.slow
def test_a_truncated_prefix(folders: dict[int, Path]) -> None:
    scene = Scene(folders)
    kept = scene.matched - 2 * scene.size
    scene.read(kept)
    scene.read(scene.matched)
    evict_tails(scene.pair.warm.cache, above=kept)
    use, difference = scene.ask(scene.matched)
    assert use == PrefixUse(kept, scene.matched, PrefixHit.TRUNCATE, 0)
    assert difference.is_small, difference


@pytest.mark.slow
def test_a_prefix_that_is_missed_for_its_tail_writes_no_global_block_again(folders: dict[int, Path]) -> None:
    scene = Scene(folders)
    matched = scene.run - scene.size
    scene.read(matched)
    evict_tails(scene.pair.warm.cache)
    use, difference = scene.ask(matched)
    assert use == PrefixUse(0, matched, PrefixHit.MISS, 0)
    assert use.rebuilt_tokens == matched
    assert difference.is_small, difference


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7])
def test_a_chunk_straddles_the_end_of_the_prefix(chunk: int, folders: dict[int, Path]) -> None:
    # Chunks end at multiples of a block where they can, so one of 7 tokens is one of 4, and the last one is longer.
    scene = Scene(folders, chunk)
    scene.read(scene.matched)
    evict_tails(scene.pair.warm.cache)
    difference = scene.pair.ask([*scene.document, *QUESTION], scene.matched)
    assert scene.pair.warm.prefix_uses["q"].hit is PrefixHit.REBUILD
    assert difference.is_small, difference


@pytest.mark.slow
def test_a_prompt_of_whole_blocks_hits_all_but_its_last_block(folders: dict[int, Path]) -> None:
    scene = Scene(folders)
    for _ in range(2):
        difference = scene.pair.ask(scene.document, scene.matched - scene.size)
        assert difference.is_small, difference
    expected = scene.matched - scene.size
    assert scene.pair.warm.prefix_uses["q"] == PrefixUse(expected, expected, PrefixHit.RESIDENT, 0)


@pytest.mark.slow
@pytest.mark.parametrize("tails", [True, False])
def test_prompt_logprobs_over_a_cached_prefix(tails: bool, folders: dict[int, Path]) -> None:
    scene = Scene(folders)
    scene.read(scene.matched)
    if not tails:
        evict_tails(scene.pair.warm.cache)
    prompt, params = [*scene.document, *QUESTION], GREEDY.replace(prompt_logprobs=3)
    found = [probe.generate({"q": prompt}, params)["q"] for probe in (scene.pair.warm, scene.pair.cold)]
    assert found[0] == found[1]
    assert scene.pair.warm.prefix_uses["q"] == PrefixUse(0, scene.matched, PrefixHit.MISS, 0)
    ours, theirs = (probe.prompt_logprobs["q"] for probe in (scene.pair.warm, scene.pair.cold))
    assert [entry.token_id for entry in ours] == prompt
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert one.logprob is not None and other.logprob is not None
        assert abs(one.logprob - other.logprob) <= LOGITS_TOLERANCE
        assert [token_id for token_id, _ in one.top] == [token_id for token_id, _ in other.top]


@pytest.mark.slow
def test_penalties_know_a_prefix_that_is_not_run(folders: dict[int, Path]) -> None:
    scene = Scene(folders)
    scene.read(scene.matched)
    prompt = [*scene.document, *QUESTION]
    params = GREEDY.replace(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3)
    found = [probe.generate({"q": prompt}, params)["q"] for probe in (scene.pair.warm, scene.pair.cold)]
    assert scene.pair.warm.prefix_uses["q"].hit is PrefixHit.RESIDENT
    assert found[0] == found[1]
    assert found[0] != scene.pair.cold.generate({"plain": prompt}, GREEDY)["plain"]


@pytest.mark.slow
def test_samples_share_a_rebuilt_prompt(folders: dict[int, Path]) -> None:
    scene = Scene(folders)
    scene.read(scene.matched)
    evict_tails(scene.pair.warm.cache)
    prompt, params = [*scene.document, *QUESTION], SamplingParams(max_tokens=12, n=2, seed=5, ignore_eos=True)
    found = [sorted(probe.generate({"q": prompt}, params)["q"]) for probe in (scene.pair.warm, scene.pair.cold)]
    assert scene.pair.warm.prefix_uses["q"].hit is PrefixHit.REBUILD
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_hit_while_slabs_move_and_live_blocks_are_gathered(folders: dict[int, Path]) -> None:
    scene = Scene(folders)
    warm = scene.pair.warm = Probe(scene.options, 8, crowded=True, spare_slabs=8)
    scene.read(scene.matched)
    slabs, copies = dict.fromkeys(PrefixHit, 0), dict.fromkeys(PrefixHit, 0)
    for number in range(12):
        if number % 4 == 3:
            evict_tails(warm.cache)
        prompt, other = [*scene.document, *tokens(5, seed=100 + number)], tokens(60 + 5 * number, seed=200 + number)
        moved, copied = warm.cache.num_slabs_moved, warm.cache.copied_bytes
        found = warm.generate({"q": prompt, "other": other}, GREEDY)
        hit = warm.prefix_uses["q"].hit
        slabs[hit] += warm.cache.num_slabs_moved - moved
        copies[hit] += warm.cache.copied_bytes - copied
        cold = Probe(scene.options, STEP_TOKENS)
        assert found == cold.generate({"q": prompt, "other": other}, GREEDY)
        end = len(prompt) + len(found["q"]) - 1
        errors = warm.logits("q", end, scene.matched) - cold.logits("q", end, scene.matched)
        assert np.abs(errors).max() <= LOGITS_TOLERANCE
    assert slabs[PrefixHit.REBUILD] > 0
    assert slabs[PrefixHit.RESIDENT] > 0
    assert copies[PrefixHit.RESIDENT] > 0
