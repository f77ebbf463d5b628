"""The bundled model finds facts a thousand tokens back, and the paged engine gives the dense model's very tokens.

A cache that loses, mixes up or outlives a block makes the answers wrong: the second half breaks it on purpose.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest

from hkv_jax.config import DEMO_MODEL
from hkv_jax.families import read_model_spec
from hkv_jax.testing.probe import ProbeOptions
from tools.demo_training import dense_answers, model, paged_scores
from tools.demo_training.paged import MAX_ANSWER_TOKENS, PagedRun, answer, num_right
from tools.demo_training.questions import Question

pytestmark = pytest.mark.slow

BASE = PagedRun(paged_scores.options(DEMO_MODEL), paged_scores.CHUNK)


def with_options(**changes: object) -> ProbeOptions:
    return dataclasses.replace(BASE.options, **changes)  # type: ignore[arg-type]


@cache
def questions() -> list[Question]:
    return paged_scores.questions()


@cache
def dense() -> list[list[int]]:
    shape, parameters = model.load(DEMO_MODEL)
    return dense_answers.greedy(shape, parameters, [one.prompt for one in questions()], MAX_ANSWER_TOKENS)


def test_the_dense_model_is_right() -> None:
    assert num_right(dense(), questions()) == len(questions())


# Runs that share their programs follow each other.
RUNS = {
    "base": BASE,
    "chunks of 7": dataclasses.replace(BASE, chunk=7),
    "chunks of a window": dataclasses.replace(BASE, chunk=32),
    "one at a time": dataclasses.replace(BASE, together=False),
    "preempted": dataclasses.replace(BASE, crowded=True),
    "blocks of 4": dataclasses.replace(BASE, options=with_options(block_size=4)),
    "blocks of 32": dataclasses.replace(BASE, options=with_options(block_size=32)),
    "4 devices": dataclasses.replace(BASE, options=with_options(tensor_parallel=4)),
}


@pytest.mark.parametrize("name", RUNS)
def test_paged_tokens_are_the_dense_ones(name: str) -> None:
    answers = answer(RUNS[name], questions())
    assert (answers.num_preemptions > 0) == (name == "preempted")
    assert answers.tokens == dense()


@pytest.mark.parametrize("name", paged_scores.cache_damages())
def test_damage_to_the_cache_makes_answers_wrong(name: str) -> None:
    run = paged_scores.damaged_run(DEMO_MODEL, name)
    assert answer(dataclasses.replace(run, damage=None), questions()).tokens == dense()
    assert num_right(answer(run, questions()).tokens, questions()) < len(questions())


# Each is a model of its own to compile; the model card has all of them.
@pytest.mark.parametrize("name", ["window 31", "RoPE swapped"])
def test_damage_to_the_model_makes_answers_wrong(name: str) -> None:
    changes = paged_scores.spec_damages(read_model_spec(DEMO_MODEL))[name]
    run = PagedRun(paged_scores.options(DEMO_MODEL, changes), paged_scores.CHUNK)
    assert num_right(answer(run, questions()).tokens, questions()) < len(questions())
