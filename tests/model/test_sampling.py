"""Drawing tokens: which are kept, how they are drawn, and that a row is alone in deciding it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from hkv_jax.model import sampling
from hkv_jax.model.sampling import NUM_CANDIDATES, LaneSampling, SamplingRows

draw_weights = jax.jit(sampling.draw_weights)
sample = jax.jit(sampling.sample)
uniform = jax.jit(sampling.uniform)
shape_logits = jax.jit(sampling.shape_logits)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row's sampling fields."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    samples: int = 0
    output_positions: int = 0
    suppress_stops: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


def as_rows(rows: Sequence[Row]) -> SamplingRows:
    def column(field: str) -> NDArray:
        dtype = np.int32 if isinstance(getattr(rows[0], field), int) else np.float32
        return np.array([getattr(row, field) for row in rows], dtype)

    words = np.array([divmod(row.seed, 2**32) for row in rows], np.int64).astype(np.uint32).view(np.int32)
    return SamplingRows(words, *(column(field) for field in SamplingRows._fields[1:]))  # type: ignore[arg-type]


def logits_of(kind: str, size: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(size)
    if kind == "peaked":
        return rng.normal(scale=4, size=size).astype(np.float32)
    if kind == "flat":  # any mass worth the name needs more than the candidates
        return rng.normal(scale=0.1, size=size).astype(np.float32)
    if kind == "ties":
        return rng.integers(-2, 3, size=size).astype(np.float32)
    if kind == "zeros":
        return np.where(rng.random(size) < 0.5, -0.0, 0.0).astype(np.float32)
    dropped = rng.normal(scale=2, size=size).astype(np.float32)
    dropped[rng.random(size) < 0.7] = -np.inf
    return dropped


def kept(logits: NDArray[np.float32], row: Row) -> tuple[NDArray[np.bool_], float]:
    """Which tokens stay, and by how much of the mass top-p came closest to deciding otherwise."""
    scaled = logits / np.float32(row.temperature)
    mass = np.exp(scaled.astype(np.float64) - scaled.max())
    mass[mass < row.min_p] = 0
    order = np.argsort(-np.where(mass > 0, scaled, -np.inf), kind="stable")
    order = order[: row.top_k or None]
    order = order[mass[order] > 0]
    margin = 1.0
    if row.top_p < 1:
        running = mass[order].cumsum() / mass[order].sum()
        order = order[: np.argmax(running >= row.top_p) + 1]
        margin = float(np.abs(running - row.top_p).min())
    result = np.zeros(len(logits), bool)
    result[order] = True
    return result, margin


LIMITS = [
    *(Row(top_k=k) for k in (0, 1, 5, NUM_CANDIDATES, NUM_CANDIDATES + 1, 200, 299, 300, 10**6)),
    *(Row(top_p=p) for p in (1e-6, 0.1003, 0.5031, 0.9003, 0.98031)),
    *(Row(min_p=p) for p in (1.0, 0.51, 0.0503)),
    *(Row(top_k=k, top_p=p) for k in (3, 50, 100, 300) for p in (0.301, 0.9503)),
    *(Row(top_k=k, top_p=p, min_p=0.0203) for k in (0, 40, 100) for p in (1.0, 0.9003)),
    *(Row(temperature=t, top_k=k, top_p=0.8003) for t in (0.3, 2.5) for k in (0, 20, 150)),
]


@pytest.mark.parametrize("kind", ["peaked", "flat", "ties", "zeros", "dropped"])
@pytest.mark.parametrize("size", [300, 5000])
def test_exactly_the_right_tokens_are_kept(size: int, kind: str) -> None:
    logits = logits_of(kind, size)
    weights = np.asarray(draw_weights(np.tile(logits, (len(LIMITS), 1)), as_rows(LIMITS)))
    beyond_candidates = 0
    for row, weight in zip(LIMITS, weights, strict=True):
        expected, margin = kept(logits, row)
        assert margin > 1e-6, f"{row}: rounding may decide; choose another limit"
        np.testing.assert_array_equal(weight > 0, expected, err_msg=str(row))
        scaled = logits.astype(np.float64) / row.temperature
        np.testing.assert_allclose(weight[expected], np.exp(scaled - scaled.max())[expected], rtol=1e-4)
        beyond_candidates += NUM_CANDIDATES < expected.sum() < size
    assert beyond_candidates >= 3, "the bisection must have been needed"


def test_top_k_is_not_exceeded_however_sums_round() -> None:
    # With so many equal logits, and all of the mass wanted, whether a running sum reaches it is a matter of rounding.
    rng = np.random.default_rng(0)
    count, size = 256, 2000
    logits = (rng.integers(0, 30, size=(count, size)) * 0.0713).astype(np.float32)
    few, many = rng.integers(2, NUM_CANDIDATES, size=count), rng.integers(NUM_CANDIDATES + 1, size, size=count)
    limits = np.where(np.arange(count) % 2, few, many)
    below_one = float(np.nextafter(np.float32(1), np.float32(0)))
    weights = np.asarray(draw_weights(logits, as_rows([Row(top_k=int(k), top_p=below_one) for k in limits])))
    assert ((weights > 0).sum(axis=1) <= limits).all()
    assert ((weights > 0).sum(axis=1) >= limits - 1).all()


@pytest.mark.parametrize("top_k", [0, 5, 100])
def test_a_top_p_too_small_for_float32_keeps_one_token(top_k: int) -> None:
    logits = np.tile(logits_of("flat", 300), (1, 1))
    weights = np.asarray(draw_weights(logits, as_rows([Row(top_k=top_k, top_p=1e-60)])))
    np.testing.assert_array_equal(np.flatnonzero(weights), [logits.argmax()])


@pytest.mark.parametrize("temperature", [1e-45, 2e-38, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = np.stack([logits_of("peaked", 300) * 100] * 3)
    rows = as_rows([Row(temperature, seed=1), Row(temperature, top_k=5, seed=2), Row(temperature, top_p=0.9, seed=3)])
    np.testing.assert_array_equal(sample(logits, rows), logits.argmax(axis=1))


def test_greedy_rows_take_the_lowest_of_the_most_likely_beside_rows_that_draw() -> None:
    logits = np.tile(logits_of("ties", 300), (3, 1))
    greedy = int(np.argmax(logits[0]))
    for last in (Row(0.0), Row(1.0, seed=5), Row(1.0, top_p=0.5, seed=6)):
        tokens = np.asarray(sample(logits, as_rows([Row(0.0), Row(0.0, top_k=3, seed=9), last])))
        assert tokens[0] == tokens[1] == greedy


MIXED = [
    Row(0.0),
    Row(1.0, seed=11),
    Row(0.7, top_k=20, seed=12),
    Row(1.3, top_p=0.9, seed=13),
    Row(1.0, top_k=100, top_p=0.8, seed=14),
    Row(1.0, min_p=0.1, seed=15),
]


def test_a_row_draws_the_same_whatever_the_other_rows_are() -> None:
    count, size = len(MIXED), 300
    rng = np.random.default_rng(3)
    logits = np.stack([logits_of("flat" if i % 2 else "peaked", size) + i for i in range(count)])
    together = np.asarray(sample(logits, as_rows(MIXED)))
    for _ in range(5):
        order = rng.permutation(count)
        moved = np.asarray(sample(logits[order], as_rows([MIXED[i] for i in order])))
        np.testing.assert_array_equal(moved, together[order])
    for number, row in enumerate(MIXED):
        for stranger in (Row(0.0), Row(1.0, top_p=0.97, seed=99)):  # none, or all, of the costly paths are taken
            others, place = [stranger] * count, number
            others[place] = row
            strange = rng.normal(size=(count, size)).astype(np.float32)
            strange[place] = logits[number]
            assert np.asarray(sample(strange, as_rows(others)))[place] == together[number]
        assert np.asarray(sample(logits[number : number + 1], as_rows([row])))[0] == together[number]


def threefry(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    mask, words = 2**32 - 1, (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    first, second = (counter[0] + words[0]) & mask, (counter[1] + words[1]) & mask
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            first = (first + second) & mask
            second = (second << turn | second >> (32 - turn)) & mask ^ first
        first = (first + words[(group + 1) % 3]) & mask
        second = (second + words[(group + 2) % 3] + group + 1) & mask
    return first, second


# (seed, sample, output position) and the number it gives, times 2**23: a promise to whoever set a seed.
DRAWS = {
    (0, 0, 0): 2371627,
    (1, 0, 0): 4179092,
    (2**32, 0, 0): 2007768,
    (2**63 - 1, 0, 0): 2165610,
    (1, 1, 0): 163191,
    (1, 0, 1): 6948888,
    (1, 63, 131_071): 6730704,
}


def test_the_draws_of_a_seed_stay_what_they_are() -> None:
    rows = [Row(seed=s, samples=n, output_positions=p) for s, n, p in DRAWS]
    numbers = np.asarray(uniform(as_rows(rows)))
    np.testing.assert_array_equal(numbers * 2**23, list(DRAWS.values()))
    for (seed, number, position), value in zip(DRAWS, numbers, strict=True):
        key = threefry(threefry(divmod(seed, 2**32), (0, number)), (0, position))
        first, second = threefry(key, (0, 0))
        assert value == ((first ^ second) >> 9) / 2**23


@pytest.mark.parametrize("varied", ["seed", "samples", "output_positions"])
@pytest.mark.parametrize("limit", [Row(1.0), Row(0.8, top_k=20), Row(1.5, top_p=0.9), Row(1.0, min_p=0.2)], ids=str)
def test_tokens_are_drawn_by_their_probability(varied: str, limit: Row) -> None:
    count, logits = 4096, logits_of("flat", 40) * 10
    keep, _ = kept(logits, limit)
    probability = np.where(keep, np.exp(logits.astype(np.float64) / limit.temperature), 0)
    probability /= probability.sum()
    changes: list[dict[str, Any]] = [{varied: i} for i in range(count)]
    rows = as_rows([dataclasses.replace(limit, **change) for change in changes])
    tokens = np.asarray(sample(np.tile(logits, (count, 1)), rows))
    seen = np.bincount(tokens, minlength=40)
    assert seen[~keep].sum() == 0
    chi_square = float((((seen - count * probability) ** 2)[keep] / (count * probability[keep])).sum())
    # Wilson and Hilferty's approximation of the value that one run in ten thousand exceeds.
    freedom = keep.sum() - 1
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.72 * np.sqrt(2 / (9 * freedom))) ** 3


class TestShaping:
    """Biases, penalties and masked stops against a loop over tokens."""

    SIZE, COUNT = 50, 4

    def lanes(self) -> LaneSampling:
        rng = np.random.default_rng(4)
        counts = rng.integers(0, 3, size=(self.COUNT, self.SIZE)).astype(np.int32)
        in_prompt = rng.random((self.COUNT, self.SIZE)) < 0.3
        ids = np.full((self.COUNT, 6), self.SIZE, np.int32)
        values = np.full((self.COUNT, 6), 77.0, np.float32)  # where there is no id, no bias either
        ids[1, :3], values[1, :3] = (0, 7, self.SIZE - 1), (5.0, -100.0, 2.5)
        stops = np.full((self.COUNT, 5), self.SIZE, np.int32)
        stops[:, :2] = (9, self.SIZE - 1)
        return LaneSampling(*(jnp.asarray(x) for x in (counts, in_prompt, ids, values, stops)))

    def expected(self, logits: NDArray, rows: Sequence[Row], lanes: LaneSampling) -> NDArray:
        counts, in_prompt, ids, values, stops = (np.asarray(x) for x in lanes)
        shaped = logits.astype(np.float64)
        for number, row in enumerate(rows):
            for token, bias in zip(ids[number], values[number], strict=True):
                if token < self.SIZE:
                    shaped[number, token] += bias
            for token in range(self.SIZE):
                count = counts[number, token]
                if count or in_prompt[number, token]:
                    factor = row.repetition_penalty
                    shaped[number, token] *= 1 / factor if shaped[number, token] > 0 else factor
                shaped[number, token] -= row.frequency_penalty * count + row.presence_penalty * (count > 0)
            if row.suppress_stops:
                shaped[number, [t for t in stops[number] if t < self.SIZE]] = -np.inf
        return shaped

    @pytest.mark.parametrize(
        "row",
        [
            Row(),
            Row(repetition_penalty=1.7),
            Row(repetition_penalty=0.5),
            Row(presence_penalty=1.5),
            Row(frequency_penalty=-0.75),
            Row(suppress_stops=1),
            Row(repetition_penalty=1.3, presence_penalty=-2.0, frequency_penalty=2.0, suppress_stops=1),
        ],
        ids=str,
    )
    def test_it_is_the_formula(self, row: Row) -> None:
        logits = np.random.default_rng(5).normal(scale=3, size=(self.COUNT, self.SIZE)).astype(np.float32)
        rows, lanes = [Row(), row, row, Row()], self.lanes()
        shaped = shape_logits(logits, as_rows(rows), lanes)
        np.testing.assert_allclose(shaped, self.expected(logits, rows, lanes), rtol=1e-5, atol=1e-5)

    def test_nothing_asked_changes_no_bit(self) -> None:
        logits = np.random.default_rng(6).normal(size=(self.COUNT, self.SIZE)).astype(np.float32)
        lanes = self.lanes()._replace(bias_ids=jnp.full((self.COUNT, 6), self.SIZE, jnp.int32))
        np.testing.assert_array_equal(shape_logits(logits, as_rows([Row()] * self.COUNT), lanes), logits)
