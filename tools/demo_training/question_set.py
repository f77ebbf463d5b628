"""The questions that are asked one by one: of the recall test, of the damage table, and of transformers.

Owns: which they are. Must never: answer one.
"""

from __future__ import annotations

import numpy as np

from tools.demo_training import documents, evaluation
from tools.demo_training.plan import Plan
from tools.demo_training.questions import Question, farthest
from tools.demo_training.tokenizer import WordEncoder

_NUM_FACTS, _NUM_HOMES = 2, 20
_KINDS = ("alike", "same attribute")
"""Where facts differ in one word, a wrong block gives a wrong answer soonest."""
_ABOUT_HOMES = {"through": 3, "home": 2, "place": 2}
"""Questions of each kind about a document full of homes: among many, one global layer does not do for both."""


def recall_questions(length: int, num_facts: int, num_copies: int) -> list[Question]:
    """The farthest facts of two documents, places and homes of two others, and numbers to copy."""
    encoder, questions = WordEncoder(), list[Question]()
    for index, kind in enumerate(_KINDS):
        rng = np.random.default_rng([evaluation.EVALUATION_SEED, length, num_facts, index])
        document = documents.write(rng, encoder, evaluation.plan(length, num_facts, kind))
        questions += farthest(document, _NUM_FACTS, ("fact",))
        homes = Plan(
            length=length,
            num_facts=4,
            same_attribute=kind == "same attribute",
            held_out=True,
            alike=kind == "alike",
            num_homes=_NUM_HOMES,
            reading_share=0.5,
            ask_after=0.5,
        )
        document = documents.write(rng, encoder, homes)
        for asked, count in _ABOUT_HOMES.items():
            questions += farthest(document, count, (asked,))
    rng = np.random.default_rng([evaluation.EVALUATION_SEED, length])
    plan = Plan(length=length, num_facts=2, same_attribute=False, held_out=True, task_rate=1.0)
    return questions + farthest(documents.write(rng, encoder, plan), num_copies, ("copy",))
