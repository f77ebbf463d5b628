"""Single questions cut out of documents: a prompt that ends where the model is to answer, and the whole answer.

Owns: the cut. Must never: know who answers.
"""

from __future__ import annotations

import dataclasses

from tools.demo_training import vocabulary
from tools.demo_training.documents import Answer, Document

END_OF_ANSWER = vocabulary.SPECIAL_TOKENS.index(vocabulary.END)


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """``prompt`` ends with the mark that opens the model's turn; ``answer`` is the whole turn, its end mark included.

    ``told_at`` is the position of the value (of the farther fact) in the prompt.
    """

    prompt: list[int]
    answer: list[int]
    kind: str
    told_at: int


def question_of(document: Document, answer: Answer) -> Question:
    """The question that ``answer`` answers."""
    tokens = document.tokens
    start = answer.whole.start
    stop = tokens.index(END_OF_ANSWER, start) + 1
    return Question(tokens[:start], tokens[start:stop], answer.kind, answer.start - answer.distance)


def farthest(document: Document, count: int, kinds: tuple[str, ...]) -> list[Question]:
    """The ``count`` questions of ``kinds`` whose facts lie farthest back and whose answers end within the document."""
    asked = [one for one in document.answers if one.kind in kinds]
    whole = [one for one in asked if END_OF_ANSWER in document.tokens[one.start :]]
    chosen = sorted(whole, key=lambda one: -one.distance)[:count]
    return [question_of(document, one) for one in sorted(chosen, key=lambda one: one.start)]
