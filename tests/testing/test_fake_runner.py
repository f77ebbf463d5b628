"""The fake device sees what a real one would silently compute from: one planted mistake a test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from hkv_jax.engine.batch import StepBatch
from hkv_jax.engine.engine import Engine
from hkv_jax.engine.request import Request
from hkv_jax.engine.scheduler import Scheduler
from hkv_jax.kvcache.group_cache import GroupCache
from hkv_jax.kvcache.layout import GroupLayout
from hkv_jax.kvcache.manager import CacheManager, Fork
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.fake_engine import FakeEngineConfig, fake_engine, global_group, sliding_group
from hkv_jax.testing.fake_runner import FakeRunner

CROWDED = FakeEngineConfig(kv_cache_memory=18 * 1024)


def run(engine: Engine) -> list[int]:
    """Tokens of a crowd that fills both pools, in the order they come; no invariant is checked on the way."""
    for number in range(12):
        params = SamplingParams(seed=number, max_tokens=20 + number, n=1 + number % 2)
        engine.add(Request.create(f"r{number}", [number] * (3 + 4 * number), params))
    tokens = []
    while engine.has_work:
        tokens += [event.token_id for event in engine.step()]
    return tokens


def test_without_a_mistake_nothing_is_seen() -> None:
    engine = fake_engine(CROWDED)
    assert len(run(engine)) == sum((1 + number % 2) * (20 + number) for number in range(12))
    assert engine.scheduler.num_preemptions > 0


def release_too_early(patch: pytest.MonkeyPatch) -> None:
    honest = GroupCache.release_window
    patch.setattr(GroupCache, "release_window", lambda self, lane, start: honest(self, lane, start + self.block_size))


def wrong_decode_slot(patch: pytest.MonkeyPatch) -> None:
    honest = GroupCache.decode_slots
    patch.setattr(GroupCache, "decode_slots", lambda self, lanes, positions: honest(self, lanes, positions) ^ 1)


def wrong_chunk_slot(patch: pytest.MonkeyPatch) -> None:
    honest = GroupCache.write_slots
    patch.setattr(GroupCache, "write_slots", lambda self, *chunk: np.roll(honest(self, *chunk), 1))


def forgotten_table_update(patch: pytest.MonkeyPatch) -> None:
    honest = GroupCache.take_updates
    patch.setattr(GroupCache, "take_updates", lambda self: honest(self)[1:])


def old_page_of_a_decode_step(patch: pytest.MonkeyPatch) -> None:
    """The block a decode step begins is allocated, but the step goes on writing to the one before."""
    honest = GroupCache.grow

    def grow(self: GroupCache, lane: int, start: int, end: int, keep_from: int) -> None:
        page = self._current_pages[lane]
        honest(self, lane, start, end, keep_from)
        if end == start + 1 and start:
            self._current_pages[lane] = page

    patch.setattr(GroupCache, "grow", grow)


def forgotten_copy(patch: pytest.MonkeyPatch) -> None:
    honest = CacheManager.fork

    def fork(self: CacheManager, source: int, target: int, num_tokens: int) -> Fork | None:
        made = honest(self, source, target, num_tokens)
        return made and dataclasses.replace(made, copies=made.copies[:-1])

    patch.setattr(CacheManager, "fork", fork)


def groups_in_the_same_slabs(patch: pytest.MonkeyPatch) -> None:
    honest = GroupLayout.page

    def page(self: GroupLayout, block: int) -> int:
        return honest(self, block) - self.initial_slabs[0] * self.pages_per_slab

    patch.setattr(GroupLayout, "page", page)
    patch.setattr(GroupLayout, "pages", lambda self, ids: np.array([page(self, i) for i in ids], np.int32))


def layers_overlap(patch: pytest.MonkeyPatch) -> None:
    """Blocks are one page apart instead of one page a layer."""
    honest = GroupLayout.page

    def page(self: GroupLayout, block: int) -> int:
        return honest(self, block) // self.format.num_layers

    patch.setattr(GroupLayout, "page", page)
    patch.setattr(GroupLayout, "pages", lambda self, ids: np.array([page(self, i) for i in ids], np.int32))


def no_lane_is_reset(patch: pytest.MonkeyPatch) -> None:
    """Tokens are computed as if the lane went on with the sequence it had before."""
    honest = FakeRunner.dispatch

    def dispatch(self: FakeRunner, plan, batch: StepBatch):  # type: ignore[no-untyped-def]
        batch.fields.start_positions[:1] += 1
        batch.fields.positions[: batch.fields.query_starts[1]] += 1
        return honest(self, plan, batch)

    patch.setattr(FakeRunner, "dispatch", dispatch)


@pytest.mark.parametrize(
    "plant",
    [
        release_too_early,
        wrong_decode_slot,
        wrong_chunk_slot,
        forgotten_table_update,
        old_page_of_a_decode_step,
        forgotten_copy,
        groups_in_the_same_slabs,
        layers_overlap,
        no_lane_is_reset,
    ],
)
def test_a_planted_mistake_is_seen(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    engine = fake_engine(CROWDED)
    with pytest.raises(AssertionError, match=r"holds the K/V|never set|two tokens in one slot|has run"):
        run(engine)


def test_a_ring_one_column_too_narrow_is_seen() -> None:
    config = dataclasses.replace(CROWDED, groups=(global_group(), sliding_group(12)))
    engine = fake_engine(config)
    layout = engine.cache.layout
    sliding = dataclasses.replace(layout.groups[1], table_width=layout.groups[1].table_width - 1)
    narrow = dataclasses.replace(layout, groups=(layout.groups[0], sliding))
    cache = CacheManager(narrow, config.max_num_seqs)
    runner = FakeRunner(narrow, engine.buckets, config.max_num_seqs, config.vocab_size)
    with pytest.raises(AssertionError, match="holds the K/V"):
        run(Engine(Scheduler(config.scheduler_config(), cache), cache, runner))


def draws(params: SamplingParams, prompt: tuple[int, ...] = (1, 2, 3)) -> list[int]:
    engine = fake_engine()
    engine.add(Request.create("r", prompt, params))
    tokens = []
    while engine.has_work:
        tokens += [event.token_id for event in engine.step() if event.sequence.sample == params.n - 1]
    return tokens


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"seed": 1 + 2**40},
        {"n": 2},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
    ],
    ids=str,
)
def test_draws_depend_on_every_parameter(change: dict[str, float]) -> None:
    base = SamplingParams(seed=1, max_tokens=12)
    assert draws(base) == draws(base)
    assert draws(dataclasses.replace(base, **change)) != draws(base)  # type: ignore[arg-type]


def test_draws_depend_on_the_whole_prompt() -> None:
    params = SamplingParams(seed=1, max_tokens=8)
    prompt = tuple(range(40))
    assert draws(params, (50, *prompt[1:])) != draws(params, prompt)


def test_suppressed_stops_are_not_drawn() -> None:
    params = SamplingParams(seed=1, max_tokens=40, min_tokens=30, stop_token_ids=tuple(range(0, 96, 2)))
    tokens = draws(params)
    assert len(tokens) > 30
    assert all(token % 2 or token == 96 for token in tokens[:30])
    assert tokens[-1] % 2 == 0


def test_reset_forgets_everything() -> None:
    engine = fake_engine(CROWDED)
    first = run(engine)
    engine._runner.reset()
    with pytest.raises(AssertionError, match="holds the K/V of something else"):
        run(engine)  # the host still believes in the prefixes of the first run
    fresh = fake_engine(CROWDED)
    run(fresh)
    fresh.scheduler.reset()
    fresh._runner.reset()
    assert sorted(run(fresh)) == sorted(first)
