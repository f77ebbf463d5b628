"""The bundled model finds facts a thousand tokens back, and the paged engine gives the dense model's very tokens.

A cache that loses, mixes up or outlives a block makes the answers wrong: the last part breaks it on purpose.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest

from hkv_jax.config import DEMO_MODEL
from hkv_jax.families import read_model_spec
from hkv_jax.outputs import PrefixHit
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.probe import Probe, ProbeOptions
from hkv_jax.testing.tail_eviction import evict_tails
from tools.demo_training import dense_answers, model, paged_scores
from tools.demo_training.paged import MAX_ANSWER_TOKENS, PagedRun, answer, num_right
from tools.demo_training.questions import END_OF_ANSWER, Question

pytestmark = pytest.mark.slow

BASE = PagedRun(paged_scores.options(DEMO_MODEL), paged_scores.CHUNK)
GREEDY = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0, stop_token_ids=(END_OF_ANSWER,))


def with_options(**changes: object) -> ProbeOptions:
    return dataclasses.replace(BASE.options, **changes)  # type: ignore[arg-type]


@cache
def questions() -> list[Question]:
    return paged_scores.questions()


@cache
def dense() -> list[list[int]]:
    shape, parameters = model.load(DEMO_MODEL)
    return dense_answers.greedy(shape, parameters, questions(), MAX_ANSWER_TOKENS)


def test_the_dense_model_is_right() -> None:
    assert num_right(dense(), questions()) == len(questions())


# Runs that share their programs follow each other.
RUNS = {
    "base": BASE,
    "chunks of 7": dataclasses.replace(BASE, chunk=7),
    "one at a time": dataclasses.replace(BASE, together=False),
    "preempted": dataclasses.replace(BASE, chunk=paged_scores.BLOCK_SIZE, crowded=True),
}


@pytest.mark.parametrize("name", RUNS)
def test_paged_tokens_are_the_dense_ones(name: str) -> None:
    answers = answer(RUNS[name], questions())
    assert (answers.num_preemptions > 0) == (name == "preempted")
    assert answers.tokens == dense()


def question_of(num_tokens: int) -> Question:
    """A question whose prompt is about as long."""
    return min(questions(), key=lambda one: abs(len(one.prompt) - num_tokens))


@pytest.mark.parametrize("hit", [PrefixHit.RESIDENT, PrefixHit.TRUNCATE, PrefixHit.REBUILD, PrefixHit.MISS])
def test_a_prefix_hit_changes_no_token(hit: PrefixHit) -> None:
    """Asked again, with what the first run left: all of it, without the last tails, without any, and a short prompt."""
    question = question_of(200 if hit is PrefixHit.MISS else paged_scores.LENGTH)
    probe, size = Probe(BASE.options, BASE.chunk), paged_scores.BLOCK_SIZE
    whole = (len(question.prompt) - 1) // size * size
    kept = whole - 4 * size  # farther back, a rebuild would compute less
    if hit is PrefixHit.TRUNCATE:
        probe.generate({"before": question.prompt[: kept + 1]}, GREEDY.replace(max_tokens=1))
    cold = Probe(BASE.options, BASE.chunk).generate({"q": question.prompt}, GREEDY)["q"]
    assert probe.generate({"first": question.prompt}, GREEDY)["first"] == cold
    if hit is not PrefixHit.RESIDENT:
        evict_tails(probe.cache, above=kept if hit is PrefixHit.TRUNCATE else 0)
    again = probe.generate({"q": question.prompt}, GREEDY)["q"]
    use = probe.prefix_uses["q"]
    assert use.hit is hit
    assert use.matched == whole
    assert again == cold == question.answer


@pytest.mark.parametrize("name", paged_scores.cache_damages())
def test_damage_to_the_cache_makes_answers_wrong(name: str) -> None:
    run = paged_scores.damaged_run(DEMO_MODEL, name)
    assert dataclasses.replace(run, damage=None) in RUNS.values()  # whole, it gives the dense tokens
    assert num_right(answer(run, questions()).tokens, questions()) < len(questions())


# Each run below is an engine of its own to compile; the model card has all of the damages.
OTHER_PROGRAMS = {
    "blocks of 4": with_options(block_size=4),
    "4 devices": with_options(tensor_parallel=4),
}


@pytest.mark.parametrize("name", OTHER_PROGRAMS)
def test_paged_tokens_of_other_programs_are_the_dense_ones(name: str) -> None:
    assert answer(PagedRun(OTHER_PROGRAMS[name], paged_scores.CHUNK), questions()).tokens == dense()


@pytest.mark.parametrize("name", ["window 31", "global layer 11 windowed"])
def test_damage_to_the_model_makes_answers_wrong(name: str) -> None:
    changes = paged_scores.spec_damages(read_model_spec(DEMO_MODEL))[name]
    run = PagedRun(paged_scores.options(DEMO_MODEL, changes), paged_scores.CHUNK)
    assert num_right(answer(run, questions()).tokens, questions()) < len(questions())
