"""What is trained when: stages of longer and longer documents, and which layer learns what.

Owns: the stages, the kinds of documents in each, and which global layers a question may use. Must never: run anything.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from tools.demo_training import vocabulary
from tools.demo_training.documents import Document, write
from tools.demo_training.plan import Plan
from tools.demo_training.tokenizer import WordEncoder

MAX_FACTS = 110


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """``steps`` batches of ``batch`` documents of ``length`` tokens.

    ``repeat_rate`` and ``remind_rate`` are how often a gap is filled by asking or telling something again: early on
    that shows the model many answers a document; later each fact is asked once. ``apart`` is how often a question is
    answered with no more than the global layers that are to learn its kind. ``about_homes`` is the share of documents
    that tell many homes and few other facts, ``alike`` the share of those whose facts differ in one word: too hard to
    begin with. With ``copy_first`` the attention of the last global layer is a copy of the first one's when the stage
    begins: by then the first can look things up, and the last need not begin anew.
    """

    length: int
    batch: int
    steps: int
    repeat_rate: float
    remind_rate: float
    apart: float
    about_homes: float = 0.0
    copy_first: bool = False
    alike: float = 0.0

    @property
    def tokens(self) -> int:
        """Of the whole stage."""
        return self.length * self.batch * self.steps


STAGES = (
    Stage(256, batch=8, steps=450, repeat_rate=0.1, remind_rate=0.85, apart=0.9),
    Stage(1024, batch=3, steps=650, repeat_rate=0.2, remind_rate=0.6, apart=0.9),
    Stage(1024, batch=3, steps=300, repeat_rate=0.1, remind_rate=0.7, apart=0.9, about_homes=0.7, copy_first=True),
    Stage(4096, batch=1, steps=900, repeat_rate=0.0, remind_rate=0.0, apart=0.6, about_homes=0.15, alike=0.5),
)

_BOTH_OFF = (0.0, 0.0)
_USED = {
    "home": (1.0, 0.0),
    "place": (0.0, 1.0),
    "copy": _BOTH_OFF,
    "repeat": _BOTH_OFF,
    "count": _BOTH_OFF,
}
"""The global layers that learn to answer a kind of question, the first and the last; both where a kind is not here. A
model finds everything with whichever layer learns to look things up first, and leaves the other idle: so homes are left
to the first and places to the last, and a question through a home needs both, in this order. What its question holds is
copied by the sliding layers alone."""


DECAY_STEPS = 1850
"""Learning rates fall for so many steps, and stay."""


def total_steps(stages: tuple[Stage, ...] = STAGES) -> int:
    """Steps of all stages."""
    return sum(stage.steps for stage in stages)


def stage_at(step: int, stages: tuple[Stage, ...] = STAGES) -> Stage:
    """The stage that a step, counted from 0, belongs to."""
    for stage in stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise ValueError(f"step is past the end of the last stage by {step}")


def begins_with_copy(step: int, stages: tuple[Stage, ...] = STAGES) -> bool:
    """Whether a stage begins with this step that begins with a copied layer."""
    return stage_at(step, stages).copy_first and (step == 0 or stage_at(step - 1, stages) != stage_at(step, stages))


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """The documents of one step, and f32[2, B, T]: 0 where the attention of a global layer is left out."""

    documents: list[Document]
    gates: NDArray[np.float32]


def draw_batch(encoder: WordEncoder, stage: Stage, seed: int, step: int) -> Batch:
    """The batch of one step: the same seed and step give the same one, wherever training was resumed."""
    rng = np.random.default_rng([seed, step])
    documents = [write(rng, encoder, draw_plan(rng, stage)) for _ in range(stage.batch)]
    return Batch(documents, np.stack([draw_gates(rng, document, stage.apart) for document in documents], axis=1))


def draw_gates(rng: np.random.Generator, document: Document, apart: float) -> NDArray[np.float32]:
    """f32[2, T]: from the first token of a question to the last of its answer, the layers that are not to answer it
    are left out, for a share ``apart`` of the questions."""
    gates = np.ones((2, len(document.tokens)), np.float32)
    for answer in document.answers:
        if answer.kind in _USED and rng.random() < apart:
            gates[:, answer.asked : answer.start + answer.num_tokens] = np.array(_USED[answer.kind])[:, None]
    return gates


def draw_plan(rng: np.random.Generator, stage: Stage) -> Plan:
    """A kind of document: half of all tell one attribute of one thing, so that only the names tell facts apart."""
    short, long = stage.length < 512, stage.length > 1024
    most = 6 if short else min(MAX_FACTS, stage.length // 24)
    num_facts = int(np.exp(rng.uniform(np.log(3), np.log(most + 1))))
    if not short and rng.random() < 0.7:
        num_facts = int(rng.integers(most // 3, most + 1))
    crowded = num_facts * 40 > stage.length
    homes = rng.choice([1, 2] if short else [0, 4, 8] if crowded else [4, 8, 16]) * (2 if long else 1)
    asked_share = 0.2 if short else 1.0
    if stage.about_homes and rng.random() < stage.about_homes:
        num_facts, crowded = int(rng.integers(2, most // 4)), False
        homes = rng.integers(6, min(stage.length // 50, len(vocabulary.HOMES)) + 1)
        asked_share = 0.3 if stage.remind_rate else 1.0
    return Plan(
        length=stage.length,
        num_facts=num_facts,
        same_attribute=bool(rng.random() < 0.5),
        clause_rate=float(rng.choice([0.0, 0.2] if crowded or short else [0.0, 0.3, 0.7])),
        num_homes=min(int(homes), len(vocabulary.HOMES)),
        # Before, such answers are the value alone: both lookups within one token, which is not learned so soon.
        name_place=long,
        repeat_rate=stage.repeat_rate,
        remind_rate=stage.remind_rate,
        task_rate=0.06,
        follow_up_rate=0.15,
        asked_share=asked_share,
        reminder_share=0.4 if short or long else 0.6,
        reading_share=float(rng.uniform(0.0, 0.3) if short else rng.uniform(0.4, 0.8)),
        ask_after=0.0 if short else float(rng.choice([0.0, 0.0, 0.6])),
        # Else a run may learn to go by owner and thing, or by half a name, which is right nine times in ten.
        alike=bool(stage.alike and rng.random() < stage.alike),
    )
