"""The dense model against the obvious form of its attention, its folder, and its training loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hkv_jax.families import read_model_spec
from hkv_jax.spec import LayerKind
from tests.tools.demo_training.tiny_shape import TINY
from tools.demo_training import curriculum, loop, model
from tools.demo_training.checkpoint import _ARRAYS, State
from tools.demo_training.curriculum import Stage
from tools.demo_training.dense_damage import damaged_shapes
from tools.demo_training.softmax_attention import attend
from tools.demo_training.tokenizer import WordEncoder

STAGES = (Stage(64, 2, 3, 0.5, 0.2, 0.5), Stage(128, 1, 2, 0.0, 0.0, 0.0, copy_first=True))


def naive(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, window: int | None) -> np.ndarray:
    """[B, T, H, D], all against all."""
    back = np.arange(queries.shape[1])[:, None] - np.arange(queries.shape[1])[None, :]
    seen = (back >= 0) & (back < (window or queries.shape[1]))
    scores = np.where(seen[None, :, None], np.einsum("bqhd,bkd->bqhk", queries, keys), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(np.einsum("bqhk,bkd->bqhd", weights / weights.sum(-1, keepdims=True), values))


@pytest.mark.parametrize("window", [None, 4, 16, 31, 32, 33, 64])
def test_attention_by_blocks_is_attention(window: int | None) -> None:
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((2, 320, 3, 8), np.float32)
    keys, values = rng.standard_normal((2, 2, 320, 8), np.float32)
    given = jnp.asarray(queries), jnp.asarray(keys), jnp.asarray(values)
    found = model.attend_globally(*given) if window is None else model.attend_near(*given, window)
    np.testing.assert_allclose(found, naive(queries, keys, values, window), atol=2e-6)


def test_the_gradient_of_attention_is_the_derived_one() -> None:
    rng = np.random.default_rng(0)
    queries, keys, values = (jnp.asarray(rng.standard_normal((2, 9, 4), np.float32)) for _ in range(3))
    seen = jnp.tril(jnp.ones((9, 9), bool))[None]

    def plain(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        scores = jnp.where(seen, jnp.einsum("bqd,bkd->bqk", queries, keys), -jnp.inf)
        return jnp.sum(jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores, axis=-1), values) ** 2)

    def own(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.sum(attend(queries, keys, values, seen) ** 2)

    expected = jax.grad(plain, (0, 1, 2))(queries, keys, values)
    for found, one in zip(jax.grad(own, (0, 1, 2))(queries, keys, values), expected, strict=True):
        np.testing.assert_allclose(found, one, atol=2e-5)


def test_a_folder_gives_back_what_was_saved_in_bfloat16(tmp_path: Path) -> None:
    parameters = model.initial_parameters(TINY, 0)
    model.save(tmp_path, TINY, parameters)
    shape, loaded = model.load(tmp_path)
    assert shape == TINY
    for name, array in parameters.items():
        np.testing.assert_array_equal(loaded[name], array.astype(jnp.bfloat16).astype(jnp.float32), err_msg=name)


def test_the_default_folder_is_the_hybrid_model_it_should_be(tmp_path: Path) -> None:
    shape = model.default_shape()
    model.save(tmp_path, shape, model.initial_parameters(shape, 0))
    spec = read_model_spec(tmp_path)
    assert [index for index, layer in enumerate(spec.layers) if layer.kind is LayerKind.GLOBAL] == [5, 11]
    assert {layer.window for layer in spec.layers} == {None, 32}
    assert spec.layers[5].rope.theta == shape.theta
    assert spec.layers[5].rope.linear_factor == shape.factor
    assert (tmp_path / "model.safetensors").stat().st_size <= 8_000_000
    assert 1_000_000 <= sum(array.size for array in model.initial_parameters(shape, 0).values()) <= 4_000_000


def test_every_damage_changes_the_logits() -> None:
    shape = dataclasses.replace(TINY, windows=(32, None, 32, None), globals_at=(1, 3))
    parameters = model.initial_parameters(shape, 0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 448, (1, 128)))
    logits = {name: np.asarray(model.forward(one, parameters, tokens)) for name, one in damaged_shapes(shape).items()}
    whole = logits.pop("none")
    assert set(logits) >= {"window 4", "window 16", "window 31", "window 33", "global layer 1 windowed", "RoPE swapped"}
    for name, damaged in logits.items():
        assert np.abs(damaged - whole).max() > 1e-3, name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> State:
    """A run that nothing stopped."""
    return loop.train(tmp_path_factory.mktemp("whole"), TINY, 7, lambda _: None, STAGES)


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_as_if_it_were_not(
    whole: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)

    class StoppedError(Exception):
        pass

    def stop_at_four(encoder: WordEncoder, stage: Stage, seed: int, step: int) -> curriculum.Batch:
        if step == 4:
            raise StoppedError
        return draw_batch(encoder, stage, seed, step)

    draw_batch = curriculum.draw_batch
    with monkeypatch.context() as patched:
        patched.setattr(curriculum, "draw_batch", stop_at_four)
        with pytest.raises(StoppedError):
            loop.train(tmp_path / "stopped", TINY, 7, lambda _: None, STAGES)
    resumed = loop.train(tmp_path / "stopped", TINY, 7, lambda _: None, STAGES)
    assert resumed.step == whole.step == 5
    for name, array in whole.parameters.items():
        np.testing.assert_array_equal(resumed.parameters[name], array, err_msg=name)


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_saves_its_last_step(whole: State, tmp_path: Path) -> None:
    answers = iter([False, False, True])
    stopped = loop.train(tmp_path / "stopped", TINY, 7, lambda _: None, STAGES, is_stopped=lambda: next(answers))
    assert stopped.step == 2
    resumed = loop.train(tmp_path / "stopped", TINY, 7, lambda _: None, STAGES)
    for name, array in whole.parameters.items():
        np.testing.assert_array_equal(resumed.parameters[name], array, err_msg=name)


def test_a_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    loop.train(tmp_path, TINY, 7, lambda _: None, STAGES[1:])
    for shape, seed, differs in ((TINY, 8, "seed"), (dataclasses.replace(TINY, hidden=32), 7, "shape")):
        with pytest.raises(SystemExit, match=rf"other settings \({differs}\)"):
            loop.train(tmp_path, shape, seed, lambda _: None, STAGES[1:])
    (tmp_path / _ARRAYS).write_bytes(b"not a checkpoint")
    with pytest.raises(SystemExit, match="not the state of a run"):
        loop.train(tmp_path, TINY, 7, lambda _: None, STAGES[1:])


@pytest.mark.slow
def test_training_lowers_the_loss(tmp_path: Path) -> None:
    state = loop.train(tmp_path, TINY, 0, lambda _: None, (Stage(64, 4, 60, 0.5, 0.2, 0.0),))
    assert state.curve[-1]["loss"] < 0.5 * np.log(TINY.vocab_size)  # half of what guessing costs
    assert state.step == 60
