"""Logprobs against a full log-softmax in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from hkv_jax.model import logprobs
from hkv_jax.model.logprobs import PROMPT_TILE_TOKENS, TopLogprobs
from hkv_jax.sampling_params import MAX_LOGPROBS

VOCABULARY, HIDDEN = 333, 8


def log_softmax(logits: NDArray) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def check(found: TopLogprobs, logits: NDArray, chosen: NDArray) -> None:
    expected = log_softmax(logits)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(found.ids, order)
    np.testing.assert_allclose(found.logprobs, np.take_along_axis(expected, order, axis=1), atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.chosen, expected[np.arange(len(chosen)), chosen], atol=1e-5, rtol=0)


def test_they_are_the_log_softmax_of_the_raw_logits() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=5, size=(3, VOCABULARY)).astype(np.float32) + np.float32(100)
    logits[1] = rng.integers(0, 3, VOCABULARY)  # ties: the lowest ids
    chosen = np.array([7, 0, VOCABULARY - 1], np.int32)
    check(jax.jit(logprobs.top_logprobs)(logits, chosen), logits, chosen)


def test_a_vocabulary_smaller_than_the_list_fills_it_with_nothing() -> None:
    found = logprobs.top_logprobs(jnp.zeros((1, 4)), jnp.array([2]))
    np.testing.assert_allclose(found.logprobs[0, :4], np.log(0.25), rtol=1e-6)
    assert (np.asarray(found.logprobs[0, 4:]) == -np.inf).all()


class TestPrompt:
    TOKENS = 21 * PROMPT_TILE_TOKENS - 11

    def hidden(self) -> NDArray[np.float32]:
        return np.random.default_rng(1).normal(size=(self.TOKENS, HIDDEN)).astype(np.float32)

    def weights(self) -> NDArray[np.float32]:
        return np.random.default_rng(2).normal(size=(HIDDEN, VOCABULARY)).astype(np.float32)

    def run(self, hidden: NDArray, targets: NDArray, num_tokens: int) -> TopLogprobs:
        weights = jnp.asarray(self.weights())
        program = jax.jit(partial(logprobs.prompt_logprobs, of_tile=lambda x, t: logprobs.top_logprobs(x @ weights, t)))
        return program(hidden, targets, num_tokens)

    @pytest.mark.parametrize("num_tokens", [1, PROMPT_TILE_TOKENS, PROMPT_TILE_TOKENS + 1, TOKENS])
    def test_tiles_give_what_the_whole_prompt_would(self, num_tokens: int) -> None:
        hidden = self.hidden()
        targets = np.random.default_rng(3).integers(0, VOCABULARY, self.TOKENS).astype(np.int32)
        found = self.run(hidden, targets, num_tokens)
        assert [part.shape[0] for part in found] == [self.TOKENS] * 3
        live = slice(0, num_tokens)
        check(TopLogprobs(*(part[live] for part in found)), hidden[live] @ self.weights(), targets[live])

    def test_a_step_smaller_than_a_tile(self) -> None:
        hidden, targets = self.hidden()[:5], np.arange(5, dtype=np.int32)
        check(self.run(hidden, targets, 5), hidden @ self.weights(), targets)

    def test_tiles_past_the_live_tokens_are_not_computed(self) -> None:
        hidden = self.hidden()
        hidden[PROMPT_TILE_TOKENS:] = np.nan
        found = self.run(hidden, np.zeros(self.TOKENS, np.int32), PROMPT_TILE_TOKENS)
        assert np.isfinite(found.chosen).all()
        assert not np.asarray(found.logprobs[PROMPT_TILE_TOKENS:]).any()

    def test_a_token_without_a_target_spoils_no_other(self) -> None:
        hidden, targets = self.hidden(), np.full(self.TOKENS, -1, np.int32)
        targets[::2] = 5
        found = self.run(hidden, targets, self.TOKENS)
        np.testing.assert_allclose(found.chosen[::2], log_softmax(hidden @ self.weights())[::2, 5], atol=1e-5)

    def test_logits_exist_for_one_tile_at_a_time(self) -> None:
        weights = jnp.asarray(self.weights())
        program = jax.jit(partial(logprobs.prompt_logprobs, of_tile=lambda x, t: logprobs.top_logprobs(x @ weights, t)))
        temporary = []
        for tiles in (4, 64):
            shapes = (jax.ShapeDtypeStruct((tiles * PROMPT_TILE_TOKENS, HIDDEN), jnp.float32),)
            targets = jax.ShapeDtypeStruct((tiles * PROMPT_TILE_TOKENS,), jnp.int32)
            memory = program.lower(*shapes, targets, 1).compile().memory_analysis()
            assert memory is not None
            temporary.append(memory.temp_size_in_bytes)
        more_tokens = 60 * PROMPT_TILE_TOKENS
        of_logits, of_results = more_tokens * VOCABULARY * 4, more_tokens * (2 * MAX_LOGPROBS + 1 + HIDDEN + 1) * 4
        assert temporary[1] - temporary[0] < 2 * of_results < of_logits / 2
