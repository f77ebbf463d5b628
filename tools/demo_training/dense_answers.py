"""Greedy answers of the dense model, from whole forward passes without any cache.

Owns: that loop. What it gives is what the paged engine must give, token for token. Must never: be told an answer that
it does not check.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from tools.demo_training.model import Parameters, Shape, forward
from tools.demo_training.questions import END_OF_ANSWER, Question

_LENGTH_UNIT = 256
"""Lengths are filled up to multiples of it; a token never sees what comes after it."""


def greedy(shape: Shape, parameters: Parameters, questions: Sequence[Question], max_tokens: int) -> list[list[int]]:
    """Up to ``max_tokens`` tokens after each prompt, ended by the mark that ends an answer.

    The right answer is the first guess. A forward pass over prompt and guess tells which of its tokens are the
    likeliest ones after those before them; from the first that is not, it is put right, until every token is.
    """
    longest = max(len(one.prompt) for one in questions) + max_tokens
    tokens = np.zeros((len(questions), -(-longest // _LENGTH_UNIT) * _LENGTH_UNIT), np.int32)
    likeliest = jax.jit(lambda tokens: jnp.argmax(forward(shape, parameters, tokens), axis=-1))
    answers = [question.answer[:max_tokens] for question in questions]
    while True:
        for row, question, answer in zip(tokens, questions, answers, strict=True):
            row[: len(question.prompt)] = question.prompt
            row[len(question.prompt) : len(question.prompt) + len(answer)] = answer
        drawn = np.asarray(likeliest(jnp.asarray(tokens)))
        found = [
            _put_right(answer, row[len(question.prompt) - 1 :])[:max_tokens]
            for question, answer, row in zip(questions, answers, drawn, strict=True)
        ]
        if found == answers:
            return answers
        answers = found


def _put_right(answer: list[int], drawn: NDArray[np.int32]) -> list[int]:
    """The answer to its first wrong token, that one put right; with one token more where it is right but not ended.

    drawn i32[>= tokens of the answer + 1]: the likeliest token in the place of each.
    """
    for index, token in enumerate(answer):
        if token != drawn[index]:
            return [*answer[:index], int(drawn[index])]
    return answer if answer[-1] == END_OF_ANSWER else [*answer, int(drawn[len(answer)])]
