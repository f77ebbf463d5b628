"""Greedy answers of the dense model: every token from a whole forward pass, without any cache.

Owns: that loop. What it gives is what the paged engine must give, token for token. Must never: be fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tools.demo_training.model import Parameters, Shape, forward
from tools.demo_training.questions import END_OF_ANSWER

_LENGTH_UNIT = 256
"""Lengths are filled up to multiples of it; a token never sees what comes after it."""


def greedy(shape: Shape, parameters: Parameters, prompts: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """Up to ``max_tokens`` tokens after each prompt, ended by the mark that ends an answer."""
    longest = max(map(len, prompts)) + max_tokens
    tokens = np.zeros((len(prompts), -(-longest // _LENGTH_UNIT) * _LENGTH_UNIT), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts])

    @jax.jit
    def likeliest(tokens: jax.Array, last: jax.Array) -> jax.Array:
        return jnp.argmax(forward(shape, parameters, tokens)[jnp.arange(len(prompts)), last], axis=-1)

    answers: list[list[int]] = [[] for _ in prompts]
    for step in range(max_tokens):
        drawn = np.asarray(likeliest(jnp.asarray(tokens), jnp.asarray(lengths + step - 1)))
        tokens[np.arange(len(prompts)), lengths + step] = drawn
        for answer, token in zip(answers, drawn.tolist(), strict=True):
            if not answer or answer[-1] != END_OF_ANSWER:
                answer.append(token)
        if all(answer[-1] == END_OF_ANSWER for answer in answers):
            break
    return answers
