"""What is trained when: three stages of longer and longer documents.

Owns: the stages and the kinds of documents in each. Must never: run anything.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tools.demo_training.documents import Document, Plan, write
from tools.demo_training.tokenizer import WordEncoder

MAX_FACTS = 110


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """``steps`` batches of ``batch`` documents of ``length`` tokens.

    ``repeat_rate`` and ``remind_rate`` are how often a gap is filled by asking or telling something again: early on
    that shows the model many answers a document; later each fact is asked once.
    """

    length: int
    batch: int
    steps: int
    repeat_rate: float
    remind_rate: float
    leave_out: float

    @property
    def tokens(self) -> int:
        """Of the whole stage."""
        return self.length * self.batch * self.steps


STAGES = (
    Stage(256, batch=8, steps=500, repeat_rate=0.3, remind_rate=0.6, leave_out=0.0),
    Stage(1024, batch=3, steps=700, repeat_rate=0.3, remind_rate=0.2, leave_out=0.3),
    Stage(4096, batch=1, steps=350, repeat_rate=0.0, remind_rate=0.0, leave_out=0.1),
    Stage(1024, batch=3, steps=250, repeat_rate=0.0, remind_rate=0.0, leave_out=0.1),
)

COPY_STEP = 1100
"""Before this step the attention of the last global layer is made a copy of the first one's: by then the first finds
facts and the other does nothing yet. From there it learns to find what the first one's finding leads to."""


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


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """The documents of one step, and for each global layer 1, or 0 where its attention is left out in this step."""

    documents: list[Document]
    gates: tuple[float, float]


def draw_batch(encoder: WordEncoder, stage: Stage, seed: int, step: int) -> Batch:
    """The batch of one step: the same seed and step give the same one, wherever training was resumed.

    A model finds its facts with whichever global layer learns it first, and leaves the other idle. So that both learn
    to, one is left out now and then; questions that take two lookups are only asked when both are there.
    """
    rng = np.random.default_rng([seed, step])
    draw = rng.random()
    gates = (0.0, 1.0) if draw < stage.leave_out else (1.0, 0.0) if draw < stage.leave_out + 0.05 else (1.0, 1.0)
    plans = [draw_plan(rng, stage) for _ in range(stage.batch)]
    if min(gates) == 0.0:
        plans = [dataclasses.replace(plan, relation_share=0.0) for plan in plans]
    return Batch([write(rng, encoder, plan) for plan in plans], gates)


def draw_plan(rng: np.random.Generator, stage: Stage) -> Plan:
    """A kind of document: half of all tell one attribute of one thing, so that only the names tell facts apart."""
    most = max(4, min(MAX_FACTS, stage.length // 24))
    num_facts = int(np.exp(rng.uniform(np.log(4), np.log(most + 1))))
    if stage.length > 1024 and rng.random() < 0.5:
        num_facts = int(rng.integers(most // 3, most + 1))
    short, crowded = stage.length < 512, num_facts * 48 > stage.length
    return Plan(
        length=stage.length,
        num_facts=num_facts,
        same_attribute=bool(rng.random() < 0.5),
        clause_rate=float(rng.choice([0.0, 0.2] if crowded or short else [0.0, 0.3, 0.7])),
        relation_share=float(rng.choice([0.0, 0.3] if short else [0.2, 0.4] if crowded else [0.4, 0.9])),
        relation_rate=0.2 if short else 0.6,
        repeat_rate=stage.repeat_rate,
        remind_rate=stage.remind_rate,
        task_rate=0.06,
        follow_up_rate=0.15,
        asked_share=0.3 if short else 1.0,
        reading_share=float(rng.uniform(0.0, 0.4) if short else rng.uniform(0.4, 0.9)),
        ask_after=0.0 if short else float(rng.choice([0.0, 0.0, 0.6])),
    )
