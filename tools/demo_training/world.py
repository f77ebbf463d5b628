"""What is true in a document: who owns what, and where people live.

Owns: ``World``, and how facts resemble each other. Must never: say anything (``documents`` does).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from tools.demo_training import grammar, vocabulary
from tools.demo_training.grammar import Fact, Home
from tools.demo_training.plan import Plan


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """What is true in a document: facts, and for those about places (by index) whose home the place is.

    Two facts about one place lead to the same home.
    """

    facts: list[Fact]
    homes: dict[int, Home]


def make_world(rng: np.random.Generator, plan: Plan) -> World:
    """Facts that differ in owner, thing or attribute, facts about places, and whose home each of these is."""
    known = vocabulary.names(held_out=plan.held_out)
    candidates = _alike(rng, known, plan.num_facts) if plan.alike else known
    values = vocabulary.values(held_out=plan.held_out)
    if plan.same_attribute:
        thing = grammar.pick(rng, vocabulary.OBJECTS)
        attributes: tuple[str, ...] = (grammar.pick(rng, vocabulary.ATTRIBUTES),)
        keys = [(f"{owner}'s {thing}", attributes[0]) for owner in _some(rng, candidates, plan.num_facts)]
    else:
        # Few of each in some documents: then attribute and thing do not give an owner away, who must be looked up.
        attributes = _some(rng, vocabulary.ATTRIBUTES, int(rng.integers(2, len(vocabulary.ATTRIBUTES) + 1)))
        keys = _mixed_keys(rng, plan, candidates, attributes)
    places = _some(rng, vocabulary.HOMES, plan.num_homes)
    residents = _some(rng, _alike(rng, known, plan.num_homes) if plan.alike else known, plan.num_homes)
    homes: dict[int, Home] = {}
    for resident, place in zip(residents, places, strict=True):
        # With one fact about every place the attribute need not be looked at.
        twice = plan.alike and len(attributes) > 1 and rng.random() < 0.5
        for attribute in _some(rng, attributes, 2) if twice else (grammar.pick(rng, attributes),):
            homes[len(keys)] = Home(resident, place)
            keys.append((f"the {place}", attribute))
    return World([Fact(*key, grammar.pick(rng, values)) for key in keys], homes)


def _alike(rng: np.random.Generator, known: tuple[str, ...], count: int) -> tuple[str, ...]:
    """At least ``count`` of ``known``, made of few pieces: most share each of theirs with others.

    Of the names never trained on, a sixth of all, it takes more pieces to have as many: of 12 then 6 in 10 share both.
    """
    pieces = (vocabulary.NAME_STARTS, vocabulary.NAME_ENDS)
    for side in range(math.isqrt(2 * count) + 1, max(map(len, pieces))):
        starts, ends = (_some(rng, each, min(side, len(each))) for each in pieces)
        made = {start + end for start in starts for end in ends}
        if len(chosen := tuple(name for name in known if name in made)) >= count:
            return chosen
    return known


def _mixed_keys(
    rng: np.random.Generator, plan: Plan, known: tuple[str, ...], attributes: tuple[str, ...]
) -> list[tuple[str, str]]:
    """Different pairs of holder and attribute: some owners have several things, some things several attributes."""
    count, twice = plan.num_facts, 0.8 if plan.alike else 0.3
    things = _some(rng, vocabulary.OBJECTS, int(rng.integers(2, len(vocabulary.OBJECTS) + 1)))
    low = max(2, count // 4, -(-2 * count // (len(things) * len(attributes))))
    owners = _some(rng, known, int(rng.integers(low, max(low, count) + 1)))
    keys: dict[tuple[str, str], None] = {}
    while len(keys) < count:
        holder = f"{grammar.pick(rng, owners)}'s {grammar.pick(rng, things)}"
        keys[holder, grammar.pick(rng, attributes)] = None
        if rng.random() < twice and len(keys) < count:
            keys[holder, grammar.pick(rng, attributes)] = None
    return list(keys)


def _some(rng: np.random.Generator, choices: tuple[str, ...], count: int) -> tuple[str, ...]:
    """``count`` different ones of ``choices``."""
    return tuple(choices[int(index)] for index in rng.choice(len(choices), count, replace=False))
