"""One long text of facts and filler, and questions about it: what a user pastes into a chat.

Owns: telling without asking. Must never: mark answers for training (``documents`` does).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tools.demo_training import grammar
from tools.demo_training.grammar import Exchange
from tools.demo_training.plan import Plan
from tools.demo_training.tokenizer import WordEncoder
from tools.demo_training.world import make_world


@dataclasses.dataclass(frozen=True)
class Story:
    """A text of about ``num_tokens`` tokens, and what can be asked about it: the earliest told first."""

    text: str
    num_tokens: int
    exchanges: list[Exchange]


def tell(seed: int, num_tokens: int, num_facts: int) -> Story:
    """A story whose facts are all of one attribute and thing, told at random places of it; names are held-out ones."""
    rng, encoder = np.random.default_rng(seed), WordEncoder()
    plan = Plan(length=num_tokens, num_facts=num_facts, same_attribute=True, held_out=True)
    world = make_world(rng, plan)
    told = [(float(rng.random()), grammar.state_fact(rng, fact, 0.3), grammar.ask_fact(fact)) for fact in world.facts]
    told.sort(key=lambda one: one[0])
    sentences: list[str] = []
    length = 0

    def say(sentence: str) -> None:
        nonlocal length
        sentences.append(sentence)
        length += len(encoder.encode(f" {sentence}"))

    for place, sentence, _ in told:
        while length < place * num_tokens:
            say(grammar.filler(rng))
        say(sentence)
    while length < num_tokens:
        say(grammar.filler(rng))
    return Story(" ".join(sentences), length, [exchange for _, _, exchange in told])
