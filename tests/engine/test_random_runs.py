"""Hundreds of mixed requests under pressure: each gets the tokens it gets alone, and nothing is left over."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hkv_jax.engine.engine import Engine
from hkv_jax.engine.request import Request, Sequence, SequenceState
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.outputs import FinishReason, PrefixHit
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.fake_engine import FakeEngineConfig, fake_engine, global_group, run_to_end, sliding_group

VOCAB = 23
ROOMY = FakeEngineConfig(vocab_size=VOCAB, kv_cache_memory=128 * 1024)

CONFIGS = {
    "roomy": ROOMY,
    "tiny pools": dataclasses.replace(ROOMY, kv_cache_memory=17 * 1024),
    "tiny pools, small chunks": dataclasses.replace(
        ROOMY, kv_cache_memory=17 * 1024, max_prefill_chunk=7, max_num_batched_tokens=11
    ),
    "two arenas": dataclasses.replace(ROOMY, kv_partition="static", kv_cache_memory=17 * 1024),
    "three lanes": dataclasses.replace(ROOMY, max_num_seqs=3, max_num_batched_tokens=9),
    "equal blocks, one wide window": dataclasses.replace(
        ROOMY,
        groups=(global_group(2), sliding_group(33, num_layers=1)),
        block_size=(("global", 4), ("sliding", 4)),
        kv_cache_memory=27 * 1024,
    ),
    "all global": dataclasses.replace(ROOMY, groups=(global_group(3),), kv_cache_memory=26 * 1024),
    "all sliding": dataclasses.replace(ROOMY, groups=(sliding_group(5),), kv_cache_memory=12 * 1024),
    "blocks of one token": dataclasses.replace(
        ROOMY, block_size=(("global", 1), ("sliding", 1)), kv_cache_memory=14 * 1024
    ),
}


DOCUMENTS = np.random.default_rng(5).integers(0, VOCAB, (3, 60))
"""What half of the prompts begin with a part of."""


def random_prompt(rng: np.random.Generator) -> list[int]:
    """Mostly short, sometimes long."""
    prompt = rng.integers(0, VOCAB, int(rng.integers(1, 90 if rng.random() < 0.25 else 20)))
    if rng.random() < 0.5:
        document = DOCUMENTS[int(rng.integers(len(DOCUMENTS)))]
        prompt = np.concatenate((document[: int(rng.integers(1, 61))], prompt[:29]))
    return [int(token) for token in prompt]


def random_request(rng: np.random.Generator, number: int) -> Request:
    """Every option that the host has a part in."""
    max_tokens = None if rng.random() < 0.1 else int(rng.integers(1, 30))
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=0 if max_tokens is None else int(rng.integers(0, max_tokens + 1)),
        seed=int(rng.integers(2**62)),
        n=int(rng.choice([1, 1, 1, 2, 4])),
        temperature=float(rng.choice([0.0, 1.0])),
        stop_token_ids=tuple(rng.integers(0, VOCAB, int(rng.integers(0, 3))).tolist()),
        logprobs=None if rng.random() < 0.7 else int(rng.integers(0, 4)),
        prompt_logprobs=None if rng.random() < 0.7 else int(rng.integers(0, 4)),
    )
    return Request.create(f"r{number}", random_prompt(rng), params, eos_token_ids=(0,))


def run_alone(config: FakeEngineConfig, request: Request) -> dict[tuple[str, int], list[TokenEvent]]:
    """The same groups and blocks, a device of its own."""
    alone = dataclasses.replace(ROOMY, groups=config.groups, block_size=config.block_size, kv_cache_memory=96 * 1024)
    engine = fake_engine(alone)
    engine.add(request)
    return run_to_end(engine)


def same(first: TokenEvent, second: TokenEvent) -> bool:
    fields = ("token_id", "logprob", "prompt_logprobs", "finish_reason", "stop_reason")
    return all(getattr(first, field) == getattr(second, field) for field in fields)


class Crowd:
    """Feeds an engine with requests while it runs, and lets some of them leave early."""

    def __init__(self, config: FakeEngineConfig, seed: int, num_requests: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.requests = [random_request(self._rng, number) for number in range(num_requests)]
        self.events: dict[tuple[str, int], list[TokenEvent]] = {}
        self.left: set[tuple[str, int]] = set()
        self.engine: Engine = fake_engine(config)

    def run(self) -> None:
        to_come = list(reversed(self.requests))
        while to_come or self.engine.has_work:
            while to_come and self._rng.random() < 0.3:
                self.engine.add(to_come.pop())
            if self._rng.random() < 0.02:
                self._abort_one(len(self.requests) - len(to_come))
            oldest = self._oldest()
            events = self.engine.step()
            assert oldest is None or oldest.state is not SequenceState.WAITING, "S4: the oldest was preempted"
            for event in events:
                self._take(event)
            self.engine.scheduler.check_invariants()

    def _oldest(self) -> Sequence | None:
        return min(self.engine.scheduler.lanes.running(), key=lambda sequence: sequence.age, default=None)

    def _abort_one(self, num_added: int) -> None:
        if num_added:
            request = self.requests[int(self._rng.integers(num_added))]
            self.engine.abort(request.request_id)
            self.left.update((request.request_id, sample) for sample in range(request.params.n))

    def _take(self, event: TokenEvent) -> None:
        key = event.sequence.request.request_id, event.sequence.sample
        assert key not in self.left, "an event of a sample that has left"
        seen = self.events.setdefault(key, [])
        assert not seen or seen[-1].finish_reason is None, "an event after the last"
        seen.append(event)
        if event.finish_reason is None and self._rng.random() < 0.005:
            self.engine.finish(*key)
            self.left.add(key)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_everyone_gets_the_tokens_they_get_alone(name: str, request: pytest.FixtureRequest) -> None:
    config = CONFIGS[name]
    if "tiny" in name:
        request.getfixturevalue("short_sighted")
    crowd = Crowd(config, seed=sorted(CONFIGS).index(name), num_requests=32)
    crowd.run()
    assert all(pool.used_blocks == 0 for pool in crowd.engine.cache.stats())
    assert crowd.engine.scheduler.num_waiting == crowd.engine.scheduler.num_running == 0
    if "tiny" in name:
        assert crowd.engine.scheduler.num_preemptions >= 3, "the pressure this test is about is missing"
    if name == "roomy":
        assert crowd.engine.scheduler.prefix_stats.hits[PrefixHit.RESIDENT] >= 3, "nobody found what others left"
    reasons = set()
    for each in crowd.requests:
        for key, alone in run_alone(config, each).items():
            crowded = crowd.events.get(key, [])
            assert len(crowded) == len(alone) or (key in crowd.left and len(crowded) <= len(alone))
            assert all(same(*pair) for pair in zip(crowded, alone, strict=False)), f"{key} differs"
            reasons.add(alone[-1].finish_reason)
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}


IN_STEP = FakeEngineConfig(vocab_size=1, max_num_batched_tokens=31)
"""All samples of a request draw the same tokens."""

SAMPLES_IN_STEP = {
    # All lanes sit out in the step after they took each other's blocks: the entries wait while the blocks are moved.
    "blocks move before the device knows them": (
        dataclasses.replace(
            IN_STEP,
            groups=(global_group(2), dataclasses.replace(sliding_group(33), num_kv_heads=3, head_dim=16)),
            block_size=(("global", 16), ("sliding", 4)),
            kv_cache_memory=51609,
            max_model_len=115,
            max_num_seqs=6,
            max_prefill_chunk=1,
        ),
        Request.create("samples", [0] * 8, SamplingParams(n=8, max_tokens=20)),
    ),
    # Lanes that sit out have entries, too: more than a bucket of those that do not would hold.
    "few run, all have table updates": (
        dataclasses.replace(
            IN_STEP,
            groups=(
                dataclasses.replace(global_group(4), num_kv_heads=2),
                dataclasses.replace(sliding_group(7), num_kv_heads=3),
            ),
            block_size=(("global", 2), ("sliding", 1)),
            kv_cache_memory=33792,
            max_model_len=46,
            max_num_seqs=8,
            max_prefill_chunk=16,
        ),
        Request.create("samples", [0] * 36, SamplingParams(n=7, max_tokens=10)),
    ),
}


@pytest.mark.parametrize("name", SAMPLES_IN_STEP)
def test_samples_that_draw_the_same_share_what_they_fill(name: str) -> None:
    config, request = SAMPLES_IN_STEP[name]
    engine = fake_engine(config)
    engine.add(request)
    while engine.has_work:
        engine.step()
        engine.scheduler.check_invariants()


def test_a_group_that_needs_its_free_blocks_gives_no_slab_away() -> None:
    """Three groups, of which two would pass one slab to and fro while the third has room to spare."""
    config = FakeEngineConfig(
        groups=(
            dataclasses.replace(global_group(), name="global_a"),
            dataclasses.replace(global_group(), name="global_b", num_kv_heads=3),
            sliding_group(10, num_layers=1),
        ),
        block_size=(("global", 4), ("sliding", 1)),
        kv_cache_memory=19456,
        max_model_len=64,
        max_num_seqs=1,
        max_num_batched_tokens=8,
        max_prefill_chunk=3,
    )
    engine = fake_engine(config)
    for token in (0, 1):
        engine.add(Request.create(str(token), [token] * 20, SamplingParams(max_tokens=43, seed=1)))
    assert {len(events) for events in run_to_end(engine).values()} == {43}


def test_with_a_window_of_one_token_the_cache_makes_room() -> None:
    """Tails are empty: evicting one frees nothing, the global blocks before it must go."""
    config = dataclasses.replace(ROOMY, groups=(global_group(2), sliding_group(1)), kv_cache_memory=24 * 1024)
    engine = fake_engine(config)
    for number in range(20):
        engine.add(Request.create(str(number), [number] * 60, SamplingParams(max_tokens=20, seed=1)))
    assert {len(events) for events in run_to_end(engine).values()} == {20}
