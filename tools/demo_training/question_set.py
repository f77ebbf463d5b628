"""The questions that are asked one by one: of the recall test, of the damage table, and of transformers.

Owns: which they are. Must never: answer one.
"""

from __future__ import annotations

import numpy as np

from tools.demo_training import documents, evaluation
from tools.demo_training.documents import Plan
from tools.demo_training.questions import Question, farthest
from tools.demo_training.tokenizer import WordEncoder

_LOOKUPS = {"fact": 2, "home": 1, "through": 2}
"""Questions of each kind about one document: what needs both global layers, either, and one after the other."""


def recall_questions(length: int, num_facts: int, num_copies: int) -> list[Question]:
    """The farthest facts, homes and facts through a home of a document of each kind, and numbers to copy."""
    encoder, questions = WordEncoder(), list[Question]()
    for index, kind in enumerate(evaluation.KINDS):
        rng = np.random.default_rng([evaluation.EVALUATION_SEED, length, num_facts, index])
        document = documents.write(rng, encoder, evaluation.plan(length, num_facts, kind))
        for asked, count in _LOOKUPS.items():
            questions += farthest(document, count, (asked,))
    rng = np.random.default_rng([evaluation.EVALUATION_SEED, length])
    plan = Plan(length=length, num_facts=2, same_attribute=False, held_out=True, task_rate=1.0)
    return questions + farthest(documents.write(rng, encoder, plan), num_copies, ("copy",))
