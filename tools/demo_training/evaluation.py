"""Exact recall by the dense model: distance, number of facts and kind of document apart.

Owns: the evaluation documents (held-out names and values, each fact asked once) and what counts as right: every token
of the answer is the most likely one given the true tokens before it, which is the same as a greedy answer that is
right. Must never: train.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from tools.demo_training import documents
from tools.demo_training.documents import Answer, Document
from tools.demo_training.model import Parameters, Shape, forward
from tools.demo_training.plan import Plan
from tools.demo_training.tokenizer import WordEncoder

BUCKETS = (256, 1024, 2048, 4096)
FACT_COUNTS = (12, 40, 100)
KINDS = ("mixed", "same attribute", "alike")
EVALUATION_SEED = 977


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """Where an answer is counted: the document's kind and facts, the answer's kind and distance bucket."""

    document: str
    num_facts: int
    answer: str
    bucket: int


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """Right answers of those asked."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Of right answers, 0 to 1; NaN when none was asked."""
        return self.right / self.asked if self.asked else float("nan")

    def __add__(self, other: Score) -> Score:
        return Score(self.right + other.right, self.asked + other.asked)


NOTHING = Score(0, 0)
Foresee = Callable[[NDArray[np.int32]], NDArray[np.bool_]]
"""Tokens i32[T] to bool[T]: whether each token was the most likely one after those before it."""


def plan(length: int, num_facts: int, kind: str) -> Plan:
    """An evaluation document: each fact asked at most once, half of the facts of crowded documents."""
    crowded = num_facts * 45 > length
    return Plan(
        length=length,
        num_facts=num_facts,
        same_attribute=kind == "same attribute",
        held_out=True,
        alike=kind == "alike",
        clause_rate=0.1 if crowded else 0.3,
        num_homes=min(16, max(6, num_facts // 3)),
        follow_up_rate=0.1,
        asked_share=0.5 if crowded else 1.0,
        reading_share=0.7,
    )


def evaluation_documents(count: int, num_facts: int, kind: str, length: int = 4096) -> Iterable[Document]:
    """``count`` documents, the same each time."""
    encoder = WordEncoder()
    for index in range(count):
        rng = np.random.default_rng([EVALUATION_SEED, KINDS.index(kind), num_facts, length, index])
        yield documents.write(rng, encoder, plan(length, num_facts, kind))


def foresee(shape: Shape, parameters: Parameters) -> Foresee:
    """The dense model as a function from tokens to which of them it foresaw; one compilation a length."""

    @jax.jit
    def run(tokens: jax.Array) -> jax.Array:
        likeliest = jnp.argmax(forward(shape, parameters, tokens[None])[0], axis=-1)
        return jnp.pad(likeliest[:-1] == tokens[1:], (1, 0))

    return lambda tokens: np.asarray(run(jnp.asarray(tokens)))


def score(
    foreseen: Foresee, count: int, say: Callable[[str], None], fact_counts: Sequence[int] = FACT_COUNTS
) -> dict[Cell, Score]:
    """The scores of ``count`` documents of each kind and number of facts; ``say`` is told which are next."""
    scores: dict[Cell, Score] = {}
    for kind in KINDS:
        for num_facts in fact_counts:
            say(f"  {count} documents, {kind}, {num_facts} facts")
            for document in evaluation_documents(count, num_facts, kind):
                right = foreseen(np.asarray(document.tokens, np.int32))
                for answer in document.answers:
                    cell = Cell(kind, num_facts, answer.kind, bucket_of(answer))
                    scores[cell] = scores.get(cell, NOTHING) + _score_one(answer, right)
    return scores


def bucket_of(answer: Answer) -> int:
    """The smallest bucket an answer's distance fits in; 0 for an answer that its question holds."""
    return 0 if answer.distance == 0 else next(bucket for bucket in BUCKETS if answer.distance <= bucket)


def total(scores: dict[Cell, Score], wanted: Callable[[Cell], bool]) -> Score:
    """The sum over the cells that are wanted."""
    return sum((score for cell, score in scores.items() if wanted(cell)), NOTHING)


def _score_one(answer: Answer, right: NDArray[np.bool_]) -> Score:
    return Score(int(right[answer.whole].all()), 1)
