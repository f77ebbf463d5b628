"""Documents: long conversations in which facts are told, and asked about later.

Owns: what is said and when, and which tokens of it are answers. A document is planned on a line of token positions:
statements and questions have times, filler fills the gaps. Must never: know the model.
"""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np

from tools.demo_training import grammar, vocabulary
from tools.demo_training.grammar import Exchange, Fact, Relation
from tools.demo_training.tokenizer import WordEncoder

FIRST_TOKEN_WEIGHT = 2.0
LEAD_WEIGHT = 0.5
"""Of the words of an answer before the value: they must be right, too, and are copied from the question."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a document is like.

    Attributes:
        length: tokens, exactly.
        num_facts: facts told.
        same_attribute: all facts are of one attribute and one thing; only the owners differ.
        held_out: names and values are those never trained on.
        clause_rate: share of facts with a clause between name and value.
        relation_share: relations told, as a share of ``num_facts``; each is asked through to a fact.
        relation_rate: how often a question through a relation comes after one for the relation itself.
        repeat_rate: share of the gaps filled with questions asked again instead of filler.
        remind_rate: share of the gaps filled with facts told again, whose values count as answers.
        task_rate: share of the gaps filled with copying and counting.
        follow_up_rate: share of questions that are followed by one that refers to them.
        asked_share: share of facts that are asked about at all.
        reading_share: facts are told in the first part of the document, this share of it.
        ask_after: no fact is asked about before this share of the document, so that what comes before is one long turn.
    """

    length: int
    num_facts: int
    same_attribute: bool
    held_out: bool = False
    clause_rate: float = 0.25
    relation_share: float = 0.3
    relation_rate: float = 0.2
    repeat_rate: float = 0.0
    remind_rate: float = 0.0
    task_rate: float = 0.05
    follow_up_rate: float = 0.15
    asked_share: float = 1.0
    reading_share: float = 0.6
    ask_after: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """Where an answer stands, ``start`` to ``start + num_tokens``, and what it needs.

    ``kind`` is fact, reminder, through, follow-up, relation, copy, repeat or count. ``distance`` is tokens from the
    value told to the value asked for, of the farther of the two facts for ``through``; 0 for what the question itself
    holds.
    """

    start: int
    num_tokens: int
    kind: str
    distance: int


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """Token ids, how much each counts as an answer (0 where it is none), and the answers."""

    tokens: list[int]
    weights: list[float]
    answers: list[Answer]


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """What is true in a document: facts, and for some of them (by index) the relation that leads to their owner."""

    facts: list[Fact]
    relations: dict[int, Relation]


class Writer:
    """Tokens as they are written, with turns opened and closed around questions."""

    def __init__(self, encoder: WordEncoder) -> None:
        self._encoder = encoder
        self._marks = encoder.special
        self.tokens = [self._marks[vocabulary.BOS], self._marks[vocabulary.USER]]
        self.weights = [0.0, 0.0]
        self.answers: list[Answer] = []
        self._turn_is_empty = True

    def say(self, sentence: str) -> None:
        """A sentence in the user's turn."""
        self._add(self._encoder.encode(sentence if self._turn_is_empty else f" {sentence}"))
        self._turn_is_empty = False

    def remind(self, fact: Fact, told_at: int) -> None:
        """The fact once more, in the user's turn."""
        before, value = grammar.remind_of_fact(fact)
        self.say(before.rstrip())
        self._answer(value, "reminder", told_at, 1.0)
        self._add(self._encoder.encode("."))

    def exchange(self, exchange: Exchange, kind: str, told_at: int | None) -> None:
        """The question, then the model's turn; ``told_at`` is where the value was told."""
        self.say(exchange.question)
        self._add([self._marks[vocabulary.END], self._marks[vocabulary.MODEL]])
        self._add(self._encoder.encode(exchange.lead.rstrip()), LEAD_WEIGHT)
        self._answer(exchange.answer, kind, told_at, exchange.weight)
        self._add([*self._encoder.encode("."), self._marks[vocabulary.END], self._marks[vocabulary.USER]])
        self._turn_is_empty = True

    def num_tokens(self, word: str) -> int:
        """Tokens of a word behind a space."""
        return len(self._encoder.encode(f" {word}"))

    def _answer(self, text: str, kind: str, told_at: int | None, weight: float) -> None:
        ids, start = self._encoder.encode(f" {text}"), len(self.tokens)
        self.answers.append(Answer(start, len(ids), kind, 0 if told_at is None else start - told_at))
        # The first token decides which fact it is; the others follow it.
        self._add(ids[:1], FIRST_TOKEN_WEIGHT * weight)
        self._add(ids[1:], weight)

    def _add(self, ids: list[int], weight: float = 0.0) -> None:
        self.tokens += ids
        self.weights += [weight] * len(ids)


class _Telling:
    """One document being written: what was told where, and what was asked."""

    def __init__(self, rng: np.random.Generator, encoder: WordEncoder, plan: Plan) -> None:
        self.rng, self.plan = rng, plan
        self.world = make_world(rng, plan)
        self.writer = Writer(encoder)
        self.fact_told: dict[int, int] = {}
        self.relation_told: dict[int, int] = {}
        self.asked: set[int] = set()

    def tell_fact(self, index: int) -> None:
        self.writer.say(grammar.state_fact(self.rng, self.world.facts[index], self.plan.clause_rate))
        value = self.world.facts[index].value
        self.fact_told[index] = len(self.writer.tokens) - 1 - self.writer.num_tokens(value)

    def tell_relation(self, index: int) -> None:
        relation = self.world.relations[index]
        self.writer.say(grammar.state_relation(relation))
        self.relation_told[index] = len(self.writer.tokens) - 1 - self.writer.num_tokens(relation.other)

    def ask(self, index: int) -> None:
        """Asks a fact if it was told, in one of its ways, and perhaps one more that refers to it."""
        if index not in self.fact_told:
            return
        fact = self.world.facts[index]
        through = index in self.relation_told and (self.rng.random() < 0.7)
        if through:
            if self.rng.random() < self.plan.relation_rate:
                relation = self.world.relations[index]
                self.writer.exchange(grammar.ask_relation(relation), "relation", self.relation_told[index])
            told_at = min(self.fact_told[index], self.relation_told[index])
            self.writer.exchange(grammar.ask_through(self.world.relations[index], fact), "through", told_at)
        else:
            self.writer.exchange(grammar.ask_fact(fact), "fact", self.fact_told[index])
        self.asked.add(index)
        if not through and self.rng.random() < self.plan.follow_up_rate:
            self._follow_up(fact)

    def fill(self) -> None:
        """One thing for a gap: an old question again, a task, or a sentence that says nothing."""
        draw, told = self.rng.random(), list(self.fact_told)
        if told and draw < self.plan.repeat_rate + self.plan.remind_rate:
            index = told[int(self.rng.integers(len(told)))]
            if draw < self.plan.repeat_rate:
                self.ask(index)
            else:
                self.writer.remind(self.world.facts[index], self.fact_told[index])
        elif draw > 1 - self.plan.task_rate:
            self._task()
        else:
            self.writer.say(grammar.filler(self.rng))

    def _follow_up(self, fact: Fact) -> None:
        for index in self.rng.permutation(list(self.fact_told)):
            other = self.world.facts[int(index)]
            if int(index) in self.asked and not self.plan.repeat_rate:
                continue
            if (other.attribute, other.thing) == (fact.attribute, fact.thing) and other.owner != fact.owner:
                exchange = grammar.follow_up_owner(other)
            elif (other.owner, other.thing) == (fact.owner, fact.thing) and other.attribute != fact.attribute:
                exchange = grammar.follow_up_attribute(other)
            else:
                continue
            self.writer.exchange(exchange, "follow-up", self.fact_told[int(index)])
            self.asked.add(int(index))
            return

    def _task(self) -> None:
        kind = ("copy", "repeat", "count")[int(self.rng.integers(3))]
        if kind == "copy":
            exchange = grammar.ask_copy("".join(map(str, self.rng.integers(0, 10, grammar.COPIED_DIGITS))))
        else:
            exchange = grammar.ask_repeat(self.rng) if kind == "repeat" else grammar.ask_count(self.rng)
        self.writer.exchange(exchange, kind, None)


def write(rng: np.random.Generator, encoder: WordEncoder, plan: Plan) -> Document:
    """One document as ``plan`` says; its facts are drawn from ``rng``."""
    telling = _Telling(rng, encoder, plan)
    events = _schedule(rng, telling.world, plan)
    tokens = telling.writer.tokens
    while len(tokens) < plan.length:
        if events and events[0][0] <= len(tokens):
            _, kind, index = heapq.heappop(events)
            if kind == "ask":
                if index not in telling.asked or plan.repeat_rate:
                    telling.ask(index)
            elif kind == "fact":
                telling.tell_fact(index)
            else:
                telling.tell_relation(index)
        else:
            telling.fill()
    answers = [one for one in telling.writer.answers if one.start + one.num_tokens <= plan.length]
    return Document(tokens[: plan.length], telling.writer.weights[: plan.length], answers)


def make_world(rng: np.random.Generator, plan: Plan) -> World:
    """Facts that differ in owner, thing or attribute, and relations to the owners of some of them."""
    known = vocabulary.names(held_out=plan.held_out)
    values = vocabulary.values(held_out=plan.held_out)
    if plan.same_attribute:
        thing, attribute = grammar.pick(rng, vocabulary.OBJECTS), grammar.pick(rng, vocabulary.ATTRIBUTES)
        owners = _some(rng, known, plan.num_facts)
        facts = [Fact(owner, thing, attribute, grammar.pick(rng, values)) for owner in owners]
    else:
        # Few of each in some documents: then attribute and thing do not give an owner away, who must be looked up.
        things = _some(rng, vocabulary.OBJECTS, int(rng.integers(2, len(vocabulary.OBJECTS) + 1)))
        attributes = _some(rng, vocabulary.ATTRIBUTES, int(rng.integers(2, len(vocabulary.ATTRIBUTES) + 1)))
        low = max(2, plan.num_facts // 4, -(-2 * plan.num_facts // (len(things) * len(attributes))))
        owners = _some(rng, known, int(rng.integers(low, max(low, plan.num_facts) + 1)))
        keys: dict[tuple[str, str, str], None] = {}
        while len(keys) < plan.num_facts:
            owner, thing = grammar.pick(rng, owners), grammar.pick(rng, things)
            keys[owner, thing, grammar.pick(rng, attributes)] = None
            if rng.random() < 0.3 and len(keys) < plan.num_facts:
                keys[owner, thing, grammar.pick(rng, attributes)] = None
        facts = [Fact(*key, grammar.pick(rng, values)) for key in keys]
    num_relations = min(round(plan.relation_share * plan.num_facts), len(known) - len(owners))
    relatives = _some(rng, tuple(name for name in known if name not in set(owners)), num_relations)
    kinds = (grammar.pick(rng, vocabulary.RELATIONS),) if rng.random() < 0.5 else vocabulary.RELATIONS
    chosen = rng.permutation(plan.num_facts)[:num_relations]
    return World(
        facts,
        {
            int(index): Relation(relative, grammar.pick(rng, kinds), facts[index].owner)
            for index, relative in zip(chosen, relatives, strict=True)
        },
    )


def _schedule(rng: np.random.Generator, world: World, plan: Plan) -> list[tuple[float, str, int]]:
    """When each fact and relation is told, and when each is asked: a heap of (token position, kind, index)."""
    events: list[tuple[float, str, int]] = []
    end = 0.97 * plan.length
    for index in range(len(world.facts)):
        told = rng.random() * plan.reading_share * plan.length
        events.append((told, "fact", index))
        latest = told
        if index in world.relations:
            relation_told = rng.random() * plan.reading_share * plan.length
            events.append((relation_told, "relation", index))
            latest = max(told, relation_told)
        if rng.random() < plan.asked_share:
            shortest = np.log(24.0)
            delay = np.exp(shortest + rng.random() * (np.log(end) - shortest))
            earliest = max(latest, plan.ask_after * plan.length)
            uniform = earliest + rng.random() * (end - earliest)
            asked = latest + delay if rng.random() < 0.4 and earliest <= latest + delay < end else uniform
            events.append((asked, "ask", index))
    heapq.heapify(events)
    return events


def _some(rng: np.random.Generator, choices: tuple[str, ...], count: int) -> tuple[str, ...]:
    """``count`` different ones of ``choices``."""
    return tuple(choices[int(index)] for index in rng.choice(len(choices), count, replace=False))
