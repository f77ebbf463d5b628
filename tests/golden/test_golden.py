"""The paged engine against Hugging Face transformers: logits of whole prompts and greedy tokens, in float32.

The references are in ``data``, written by ``tools/make_golden.py``. One factor at a time is varied from a base for
every family; for gemma3 the full product.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from hkv_jax.families import read_model_spec
from hkv_jax.kvcache.format import PageLayout
from hkv_jax.kvcache.room import Room
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.spec import LayerSpec, ModelSpec
from hkv_jax.testing.probe import Probe, ProbeOptions

DATA = Path(__file__).parent / "data"
FAMILIES = ("gemma3_text", "gemma3", "gemma2", "llama", "mistral", "qwen3", "cwm")
TOLERANCE = 2e-4
GREEDY = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
WHOLE = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One point of the product; the defaults are the base.

    ``company``: ``alone``; ``batched``, all prompts at once in fewer lanes; ``preempted``, the same in pools that hold
    one sequence of the longest length, to which everyone is admitted, so that sequences must give way and be computed
    again.
    """

    chunk: int = WHOLE
    block_size: int = 16
    tensor_parallel: int = 1
    partition: str = "moving"
    company: str = "alone"
    page_layout: PageLayout = PageLayout.ROWS

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        ]
        return ",".join(changed) or "base"


# In both, cases that share their programs follow each other.
ONE_FACTOR = (
    Case(),
    *(Case(chunk=chunk) for chunk in (1, 7, 16)),
    Case(company="batched"),
    Case(company="preempted"),
    Case(block_size=4),
    Case(tensor_parallel=2),
    Case(tensor_parallel=4),
    Case(partition="static"),
    Case(page_layout=PageLayout.PLANES),
)
PRODUCT = tuple(
    Case(chunk, block_size, tensor_parallel, partition, company)
    for block_size, tensor_parallel, partition, company, chunk in itertools.product(
        (4, 16), (1, 2, 4), ("moving", "static"), ("alone", "batched", "preempted"), (1, 7, 16, WHOLE)
    )
)


@dataclasses.dataclass(frozen=True)
class Golden:
    """Prompts of a family with their reference logits [n, V] and 48 greedy tokens."""

    prompts: tuple[list[int], ...]
    logits: tuple[np.ndarray, ...]
    greedy: tuple[list[int], ...]


def load(family: str) -> Golden:
    with np.load(DATA / family / "golden.npz") as file:
        count = sum(name.startswith("prompt_") for name in file)
        return Golden(
            tuple(file[f"prompt_{i}"].tolist() for i in range(count)),
            tuple(file[f"logits_{i}"] for i in range(count)),
            tuple(file[f"greedy_{i}"].tolist() for i in range(count)),
        )


def probe_options(family: str, case: Case) -> ProbeOptions:
    return ProbeOptions(
        DATA / family,
        block_size=case.block_size,
        tensor_parallel=case.tensor_parallel,
        partition=case.partition,
        page_layout=case.page_layout,
    )


@pytest.fixture
def company(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forecast is exact for requests as short as these: nobody it lets in would ever be sent back."""
    if case.company == "preempted":
        monkeypatch.setattr(Room, "fits", lambda *_: True)


def run(options: ProbeOptions, case: Case, golden: Golden, chosen: range) -> tuple[float, list[bool]]:
    """Runs prompts ``chosen`` and returns the largest error of a logit and whether each one's tokens are right."""
    worst, same = 0.0, []
    together = [tuple(chosen)] if case.company != "alone" else [(i,) for i in chosen]
    for prompts in together:
        probe = Probe(options, case.chunk, crowded=case.company == "preempted")
        tokens = probe.generate({f"{i}": golden.prompts[i] for i in prompts}, GREEDY)
        assert (probe.scheduler.num_preemptions > 0) == (case.company == "preempted")
        for i in prompts:
            found = probe.logits(f"{i}", len(golden.prompts[i]))
            worst = max(worst, float(np.abs(found - golden.logits[i]).max()))
            same.append(tokens[f"{i}"] == golden.greedy[i])
    return worst, same


BASE_THEN_SLOW = [
    pytest.param(case, marks=[] if case == Case() else pytest.mark.slow, id=str(case)) for case in ONE_FACTOR
]


@pytest.mark.usefixtures("company")
@pytest.mark.parametrize("case", BASE_THEN_SLOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_factor(family: str, case: Case) -> None:
    golden = load(family)
    worst, same = run(probe_options(family, case), case, golden, range(len(golden.prompts)))
    assert worst <= TOLERANCE
    assert all(same)


@pytest.mark.slow
@pytest.mark.usefixtures("company")
@pytest.mark.parametrize("case", PRODUCT, ids=str)
def test_full_product_of_gemma3(case: Case) -> None:
    golden = load("gemma3_text")
    # Every other prompt, 1 to 64 tokens: below, at, just above and four times the window.
    worst, same = run(probe_options("gemma3_text", case), case, golden, range(0, len(golden.prompts), 2))
    assert worst <= TOLERANCE
    assert all(same)


def _window(spec: ModelSpec, window: int) -> tuple[LayerSpec, ...]:
    return tuple(dataclasses.replace(layer, window=window) if layer.window else layer for layer in spec.layers)


def _swapped_rope(spec: ModelSpec) -> tuple[LayerSpec, ...]:
    ropes = {layer.kind: layer.rope for layer in spec.layers}
    other = dict(zip(ropes, reversed(ropes.values()), strict=True))
    return tuple(dataclasses.replace(layer, rope=other[layer.kind]) for layer in spec.layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "damage"),
    [
        ("gemma3_text", lambda spec: {"layers": _window(spec, 15)}),
        ("gemma3_text", lambda spec: {"layers": _window(spec, 17)}),
        ("gemma3_text", lambda spec: {"layers": _swapped_rope(spec)}),
        ("gemma2", lambda spec: {"attention_soft_cap": None}),
        ("gemma2", lambda spec: {"final_soft_cap": None}),
    ],
    ids=("window 15", "window 17", "swapped rope", "no attention cap", "no final cap"),
)
def test_damage_is_seen(family: str, damage) -> None:  # type: ignore[no-untyped-def]
    golden = load(family)
    changes = tuple(damage(read_model_spec(DATA / family)).items())
    options = dataclasses.replace(probe_options(family, Case()), spec_changes=changes)
    worst, _ = run(options, Case(), golden, range(len(golden.prompts) - 1, len(golden.prompts)))
    assert worst > 50 * TOLERANCE
