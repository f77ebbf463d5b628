"""Sentences: how a fact, a relation, a filler or a question is put into English.

Owns: the shapes of sentences. A sentence carries no space in front; whoever joins sentences puts one between. Must
never: decide what a document says (``documents`` does).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tools.demo_training import vocabulary as words

MAX_CLAUSE_PARTS = 5
THROUGH_WEIGHT = 1.5
"""Questions that take two lookups are the hardest, and not the most frequent."""
COPIED_DIGITS = 27
"""Digits of a number to copy. Each copy stands 32 tokens after its digit (the rest of them, ".", the marks that end the
turn and open the answer, "It" and "is"), and is read from the token before it, window - 1 back."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """``attribute`` of ``holder`` is ``value``; a holder is someone's thing ("Ada's box") or a place ("the mill")."""

    holder: str
    attribute: str
    value: str


@dataclasses.dataclass(frozen=True, slots=True)
class Home:
    """``owner`` lives at ``place``."""

    owner: str
    place: str


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """A question and its answer: ``lead`` + ``answer`` + ".", of which ``answer`` is what must be known."""

    question: str
    lead: str
    answer: str
    weight: float = 1.0


def pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    """One of ``choices``."""
    return choices[int(rng.integers(len(choices)))]


def state_fact(rng: np.random.Generator, fact: Fact, clause_rate: float) -> str:
    """A sentence that tells a fact; with probability ``clause_rate`` a clause parts the name from the value."""
    head = f"The {fact.attribute} of {fact.holder}"
    if rng.random() < clause_rate:
        return f"{head}, {_clause(rng)}, is {fact.value}."
    return f"{head} is {fact.value}."


def remind_of_fact(fact: Fact) -> tuple[str, str]:
    """A sentence that tells a fact again: what comes before the value, and the value."""
    return f"The {fact.attribute} of {fact.holder} is ", fact.value


def remind_of_home(home: Home) -> tuple[str, str]:
    """A sentence that tells again where someone lives: what comes before the place, and the place."""
    return f"{home.owner}'s {words.HOME} is the ", home.place


def state_home(home: Home) -> str:
    """A sentence that tells where someone lives."""
    return f"{home.owner}'s {words.HOME} is the {home.place}."


def ask_fact(fact: Fact) -> Exchange:
    """The question for a fact. An answer is a whole sentence that says what it is about."""
    about = f"{fact.attribute} of {fact.holder}"
    return Exchange(f"What is the {about}?", f"The {about} is ", fact.value)


def ask_home(home: Home) -> Exchange:
    """The question for where someone lives."""
    about = f"{home.owner}'s {words.HOME}"
    return Exchange(f"What is {about}?", f"{about} is the ", home.place)


def ask_through(home: Home, fact: Fact, *, name_place: bool) -> Exchange:
    """The question for a fact about a place that is only named as a home: two lookups, one after the other.

    Where the answer does not name the place, both are made for one token.
    """
    about = f"{fact.attribute} of {home.owner}'s {words.HOME}"
    lead, answer = (
        (f"The {about}, the ", f"{home.place}, is {fact.value}") if name_place else (f"The {about} is ", fact.value)
    )
    return Exchange(f"What is the {about}?", lead, answer, weight=THROUGH_WEIGHT)


def follow_up_holder(fact: Fact) -> Exchange:
    """Asks what was asked before, of another holder."""
    return dataclasses.replace(ask_fact(fact), question=f"And of {fact.holder}?")


def follow_up_attribute(fact: Fact) -> Exchange:
    """Asks another attribute of what was asked before."""
    return dataclasses.replace(ask_fact(fact), question=f"And the {fact.attribute}?")


def ask_copy(digits: str) -> Exchange:
    """Asks for a long number again: with ``COPIED_DIGITS`` digits each is read from exactly window - 1 back."""
    return Exchange(f"Copy the number {digits}.", "It is ", digits, weight=0.3)


def ask_repeat(rng: np.random.Generator) -> Exchange:
    """Asks for a few words again."""
    said = " ".join(pick(rng, words.REPEATED) for _ in range(int(rng.integers(2, 9))))
    return Exchange(f"Say the words: {said}.", "It is ", said, weight=0.3)


def ask_count(rng: np.random.Generator) -> Exchange:
    """Asks how many words of a kind are there, 1 to 12."""
    thing, number = pick(rng, words.COUNTED), int(rng.integers(1, 13))
    return Exchange(f"Count the words: {' '.join([thing] * number)}.", "It is ", str(number))


def filler(rng: np.random.Generator) -> str:
    """A sentence that says nothing anyone asks about."""
    subject = f"{pick(rng, words.ADJECTIVES)} {pick(rng, words.SUBJECTS)}"
    thing = f"{pick(rng, words.COLORS)} {pick(rng, words.THINGS)}"
    shape = rng.integers(4)
    if shape == 0:
        return f"The {subject} {pick(rng, words.VERBS)} the {thing} near the {pick(rng, words.PLACES)}."
    if shape == 1:
        return f"In the {pick(rng, words.TIMES)} the {subject} {pick(rng, words.VERBS)} a {thing}."
    if shape == 2:
        return f"There was a {thing} behind the {pick(rng, words.PLACES)}."
    return f"When the rain came, the {subject} stayed at the {pick(rng, words.PLACES)} every {pick(rng, words.TIMES)}."


def _clause(rng: np.random.Generator) -> str:
    """A relative clause of 5 to 25 tokens: with the longest a value begins window - 1 tokens after the name."""
    parts = [f"which the {pick(rng, words.ADJECTIVES)} {pick(rng, words.SUBJECTS)} {pick(rng, words.VERBS)}"]
    for _ in range(int(rng.integers(0, MAX_CLAUSE_PARTS + 1))):
        shape = rng.integers(3)
        if shape == 0:
            parts.append(f"near the {pick(rng, words.ADJECTIVES)} {pick(rng, words.PLACES)}")
        elif shape == 1:
            parts.append(f"in the {pick(rng, words.ADJECTIVES)} {pick(rng, words.TIMES)}")
        else:
            parts.append(f"with a {pick(rng, words.COLORS)} {pick(rng, words.THINGS)}")
    return " ".join(parts)
