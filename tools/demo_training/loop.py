"""The training loop: batch, step, report, checkpoint.

Owns: the loss and the order of things. Must never: know what a document says.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from tools.demo_training import checkpoint, curriculum, optimiser
from tools.demo_training.checkpoint import State
from tools.demo_training.curriculum import Batch, Stage
from tools.demo_training.documents import Document
from tools.demo_training.model import Parameters, Shape, copy_global_attention, forward, initial_parameters
from tools.demo_training.tokenizer import WordEncoder

OTHER_TOKENS = 0.1
"""What the mean loss of the tokens that are no answers counts, against that of answers."""
REPORT_EVERY = 20
SAVE_EVERY = 100


def loss(
    shape: Shape, parameters: Parameters, tokens: jax.Array, weights: jax.Array, global_gates: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weighted mean cross-entropy of answers plus a tenth of that of all other tokens; and which tokens were foreseen.

    tokens i32[B, T], weights f32[B, T], gates f32[global layers, B, T] → a scalar, and bool[B, T]; the first column
    false.
    """
    logits = forward(shape, parameters, tokens, global_gates)[:, :-1]
    targets = jax.nn.one_hot(tokens[:, 1:], shape.vocab_size)
    entropies = -jnp.sum(jax.nn.log_softmax(logits) * targets, axis=-1)
    answer = weights[:, 1:]
    other = (answer == 0).astype(jnp.float32)
    value = jnp.sum(entropies * answer) / jnp.maximum(jnp.sum(answer), 1.0)
    value += OTHER_TOKENS * jnp.sum(entropies * other) / jnp.maximum(jnp.sum(other), 1.0)
    right = jnp.pad(jnp.argmax(logits, axis=-1) == tokens[:, 1:], ((0, 0), (1, 0)))
    return value, right


def train(
    folder: Path,
    shape: Shape,
    seed: int,
    say: Callable[[str], None],
    stages: tuple[Stage, ...] = curriculum.STAGES,
    is_stopped: Callable[[], bool] = lambda: False,
) -> State:
    """Train to the end of the last stage, from the checkpoint in ``folder`` where there is one.

    A run that ``is_stopped`` ends after the step it is in, and its state is saved: the next call goes on from there.
    """
    transform = optimiser.make(min(curriculum.DECAY_STEPS, curriculum.total_steps(stages)))
    parameters = initial_parameters(shape, seed)
    identity: dict[str, Any] = {
        "seed": seed,
        "stages": [dataclasses.astuple(stage) for stage in stages],
        "shape": dataclasses.asdict(shape),
        "rates": [optimiser.MUON_RATE, optimiser.ADAM_RATE, curriculum.DECAY_STEPS],
    }
    state = checkpoint.restore(folder, State(parameters, transform.init(parameters)), identity)
    total, encoder = curriculum.total_steps(stages), WordEncoder()
    say(f"seed {seed}: step {state.step} of {total}")
    tally, started, tokens_done = Tally(), time.perf_counter(), 0
    while state.step < total and not is_stopped():
        stage = curriculum.stage_at(state.step, stages)
        if curriculum.begins_with_copy(state.step, stages):
            state.parameters = copy_global_attention(shape, state.parameters)
        batch = curriculum.draw_batch(encoder, stage, seed, state.step)
        tokens, weights = as_arrays(batch.documents)
        value, right, state.parameters, state.optimiser = _step(
            shape, transform, state.parameters, state.optimiser, (tokens, weights, batch.gates)
        )
        tally.add(float(value), batch, np.asarray(right))
        state.step, tokens_done = state.step + 1, tokens_done + tokens.size
        if state.step % REPORT_EVERY == 0 or state.step == total:
            record = {"step": state.step, "length": stage.length, **tally.take()}
            state.curve.append(record)
            speed = tokens_done / (time.perf_counter() - started)
            numbers = " ".join(
                f"{name} {number:.3f}" for name, number in record.items() if name not in ("step", "length")
            )
            say(f"step {state.step}/{total} length {stage.length} {speed:.0f} tokens/s: {numbers}")
        if state.step % SAVE_EVERY == 0:
            checkpoint.save(folder, state, identity)
    if state.step % SAVE_EVERY:
        checkpoint.save(folder, state, identity)
    return state


def as_arrays(batch: list[Document]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Tokens and weights of documents of one length, [B, T] each."""
    tokens = np.asarray([document.tokens for document in batch], np.int32)
    return tokens, np.asarray([document.weights for document in batch], np.float32)


class Tally:
    """The loss and the share of exactly right answers of each kind, since the last report."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._right: defaultdict[str, list[bool]] = defaultdict(list)

    def add(self, value: float, batch: Batch, right: NDArray[np.bool_]) -> None:
        """One step's outcome; ``right`` as ``loss`` gives it. Answers of a part of the model are counted apart."""
        self._losses.append(value)
        for index, document in enumerate(batch.documents):
            for answer in document.answers:
                suffix = "" if batch.gates[:, index, answer.asked].all() else " apart"
                whole = right[index, answer.start : answer.start + answer.num_tokens].all()
                self._right[answer.kind + suffix].append(bool(whole))

    def take(self) -> dict[str, float]:
        """The means, rounded; counting starts again."""
        means = {"loss": float(np.mean(self._losses))}
        means |= {kind: float(np.mean(self._right[kind])) for kind in sorted(self._right)}
        self._losses.clear()
        self._right.clear()
        return {name: round(value, 4) for name, value in means.items()}


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _step(
    shape: Shape,
    transform: optax.GradientTransformation,
    parameters: Parameters,
    optimiser_state: Any,
    batch: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, Parameters, Any]:
    (value, right), gradients = jax.value_and_grad(partial(loss, shape), has_aux=True)(parameters, *batch)
    updates, optimiser_state = transform.update(gradients, optimiser_state, parameters)
    return value, right, optax.apply_updates(parameters, updates), optimiser_state
