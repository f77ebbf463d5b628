"""What the model card tells: each part is measured, written to its section, and held against the goals.

Owns: the goals and the tables. Must never: train, or change what is measured to fit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.demo_training import dense_damage, evaluation, model, paged_scores, reference_scores
from tools.demo_training.card import percent, replace_section, table
from tools.demo_training.evaluation import BUCKETS, FACT_COUNTS, KINDS, Cell, Score, total
from tools.throwaway_env import say

CARD = "README.md"
CURVE = "training_curve.json"
GOAL = 0.98
CROWDED_SAME_ATTRIBUTE_GOAL = 0.95
"""At 100 facts that differ in the name alone."""
DAMAGED_SHARE = 4
"""One in so many of the documents is enough to see damage, of which there is a lot to try."""
MOST_APART = 0.02
"""Of two training seeds' shares."""
_OTHER_KINDS = {
    "through": "through a home",
    "home": "a home",
    "place": "a fact about a place",
    "follow-up": "follow-up",
    "copy": "copy of a number",
    "repeat": "words again",
    "count": "count",
}
_DAMAGE_KINDS = ("home", "place", "through", "copy")
Scores = dict[Cell, Score]


def write_recall(options: argparse.Namespace) -> bool:
    """Recall by bucket, facts and kind of document; the other kinds of questions in one line each."""
    scores = _scores(options.model, options.documents)
    rows, good = [], True
    for kind in KINDS:
        for count in FACT_COUNTS:
            cells = [_recall(scores, kind, count, bucket) for bucket in BUCKETS]
            goal = CROWDED_SAME_ATTRIBUTE_GOAL if (kind, count) == ("same attribute", 100) else GOAL
            good = good and all(cell.asked and cell.share >= goal for cell in cells)
            rows.append([f"{kind}, {count} facts", *(f"{percent(cell)} ({cell.asked})" for cell in cells)])
    others = [(name, total(scores, _of_kind(kind))) for kind, name in _OTHER_KINDS.items()]
    lines = [
        f"Whole answers, greedy, % (questions asked). {options.documents} documents of 4,096 tokens a row.",
        "",
        *table(["document", *(f"≤ {bucket:,} back" for bucket in BUCKETS)], rows),
        "",
        "Other questions in the same documents:",
        "",
        *table(["question", "right %", "asked"], [[name, percent(one), str(one.asked)] for name, one in others]),
    ]
    replace_section(options.model / CARD, "recall", lines)
    return good


def write_seeds(options: argparse.Namespace) -> bool:
    """The recall of two seeds side by side; far apart is a miss."""
    ours, theirs = _scores(options.model, options.documents), _scores(options.other, options.documents)
    rows, good = [], True
    for kind in KINDS:
        for count in FACT_COUNTS:
            pair = [total(each, _of_row(kind, count)) for each in (ours, theirs)]
            good = good and abs(pair[0].share - pair[1].share) <= MOST_APART
            rows.append([f"{kind}, {count} facts", *map(percent, pair)])
    rows += [
        [_OTHER_KINDS[kind], *(percent(total(each, _of_kind(kind))) for each in (ours, theirs))]
        for kind in ("through", "copy")
    ]
    seeds = [_curve(folder)["seed"] for folder in (options.model, options.other)]
    headings = ["document", f"seed {seeds[0]} (shipped)", f"seed {seeds[1]}"]
    replace_section(options.model / CARD, "seeds", table(headings, rows))
    return good


def write_damage(options: argparse.Namespace) -> bool:
    """Scores of the damaged model, dense on long documents and paged on the recall test's questions."""
    shape, parameters = model.load(options.model)
    dense: dict[str, Scores] = {}
    for name, damaged in dense_damage.damaged_shapes(shape).items():
        foreseen = evaluation.foresee(damaged, parameters)
        say(f"  dense, {name}")
        dense[name] = evaluation.score(foreseen, options.documents // DAMAGED_SHARE, say, (40,))
    say("  paged engine")
    paged = paged_scores.damage_scores(options.model)
    rows = []
    for name in dict.fromkeys((*dense, *paged)):
        scores = dense.get(name, {})
        facts = [total(scores, _of_facts(far=far)) for far in (False, True)]
        one = paged[name]
        columns = facts + [total(scores, _of_kind(kind)) for kind in _DAMAGE_KINDS]
        rows.append([name, *map(percent, columns), f"{one.right} of {one.asked}"])
    kinds = [_OTHER_KINDS[kind] for kind in _DAMAGE_KINDS]
    headings = ["damage", "facts ≤ 256 back", "facts farther", *kinds, "paged engine"]
    each = f"Dense: {options.documents // DAMAGED_SHARE} documents of each kind."
    replace_section(options.model / CARD, "damage", [each, "", *table(headings, rows)])
    return all((one.right == one.asked) == (name == "none") for name, one in paged.items())


def write_transformers(options: argparse.Namespace) -> bool:
    """Greedy tokens of transformers against ours, dense and paged."""
    outcome = reference_scores.compare(options.model, options.venv)
    replace_section(options.model / CARD, "transformers", outcome.lines())
    return outcome.identical


def write_curve(options: argparse.Namespace) -> bool:
    """The training curve, every fifth report."""
    record = _curve(options.model)
    reports = record["curve"]
    chosen = [*reports[:-1:5], reports[-1]]
    kinds = ("fact", "home apart", "place apart", "through", "copy apart")
    rows = [
        [str(one["step"]), str(one["length"]), f"{one['loss']:.3f}"]
        + [f"{100 * one[kind]:.0f}" if kind in one else "–" for kind in kinds]
        for one in chosen
    ]
    headings = ["step", "tokens a document", "loss", *(f"{kind} %" for kind in kinds)]
    replace_section(options.model / CARD, "curve", table(headings, rows))
    return True


def _scores(folder: Path, documents: int) -> Scores:
    shape, parameters = model.load(folder)
    return evaluation.score(evaluation.foresee(shape, parameters), documents, say)


def _curve(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / CURVE).read_text(encoding="utf-8"))
    return record


def _recall(scores: Scores, kind: str, num_facts: int, bucket: int) -> Score:
    return total(scores, lambda cell: cell == Cell(kind, num_facts, "fact", bucket))


def _of_row(kind: str, num_facts: int) -> Callable[[Cell], bool]:
    return lambda cell: (cell.document, cell.num_facts, cell.answer) == (kind, num_facts, "fact")


def _of_facts(*, far: bool) -> Callable[[Cell], bool]:
    return lambda cell: cell.answer == "fact" and (cell.bucket > BUCKETS[0]) == far


def _of_kind(kind: str) -> Callable[[Cell], bool]:
    return lambda cell: cell.answer == kind
