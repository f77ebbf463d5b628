"""Documents: long conversations in which facts are told, and asked about later.

Owns: what is said and when, and which tokens of it are answers. A document is planned on a line of token positions:
statements and questions have times, filler fills the gaps. Must never: know the model.
"""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np

from tools.demo_training import grammar, vocabulary
from tools.demo_training.grammar import Exchange, Fact, Home
from tools.demo_training.plan import Plan
from tools.demo_training.tokenizer import WordEncoder
from tools.demo_training.world import World, make_world

FIRST_TOKEN_WEIGHT = 2.0
TASK_TOKENS = 32
HOME_SHARE = 0.7
"""Of the questions for a fact about a place: those that say whose home it is; others name the place."""
ALONE_SHARE = 0.35
"""Of the former, where answers name the place: those for the home itself instead of the fact."""
BOTH_SHARE = 0.5
"""Of the former, where answers do not name it: those that ask for the home as well."""
LEAD_WEIGHT = 0.5
"""Of the words of an answer before the value: they must be right, too, and are copied from the question."""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """Where an answer's value stands, ``start`` to ``start + num_tokens``, behind ``lead`` tokens of words; its needs.

    ``kind`` is fact, place, reminder, through, follow-up, home, copy, repeat or count. ``asked`` is where its question
    starts. ``distance`` is tokens from the value told to the value asked for, of the farther of the two facts for
    ``through``; 0 for what the question itself holds.
    """

    asked: int
    start: int
    num_tokens: int
    kind: str
    distance: int
    lead: int = 0

    @property
    def whole(self) -> slice:
        """Where the answer lies, its words and its value."""
        return slice(self.start - self.lead, self.start + self.num_tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """Token ids, how much each counts as an answer (0 where it is none), and the answers."""

    tokens: list[int]
    weights: list[float]
    answers: list[Answer]


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

    def remind(self, sentence: tuple[str, str], kind: str, told_at: int) -> None:
        """A sentence once more, in the user's turn: what comes before the value, and the value."""
        before, value = sentence
        asked = len(self.tokens)
        self.say(before.rstrip())
        self._answer(asked, value, kind, told_at, 1.0)
        self._add(self._encoder.encode("."))

    def exchange(self, exchange: Exchange, kind: str, told_at: int | None) -> None:
        """The question, then the model's turn; ``told_at`` is where the value was told."""
        asked = len(self.tokens)
        self.say(exchange.question)
        self._add([self._marks[vocabulary.END], self._marks[vocabulary.MODEL]])
        lead = self._encoder.encode(exchange.lead.rstrip())
        self._add(lead, LEAD_WEIGHT)
        self._answer(asked, exchange.answer, kind, told_at, exchange.weight, len(lead))
        self._add([*self._encoder.encode("."), self._marks[vocabulary.END], self._marks[vocabulary.USER]])
        self._turn_is_empty = True

    def num_tokens(self, word: str) -> int:
        """Tokens of a word behind a space."""
        return len(self._encoder.encode(f" {word}"))

    def _answer(self, asked: int, text: str, kind: str, told_at: int | None, weight: float, lead: int = 0) -> None:
        ids, start = self._encoder.encode(f" {text}"), len(self.tokens)
        self.answers.append(Answer(asked, start, len(ids), kind, 0 if told_at is None else start - told_at, lead))
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
        self.home_told: dict[Home, int] = {}
        self.named: set[Home] = set()  # an answer has told of these where they are
        self.asked: set[int] = set()

    def tell_fact(self, index: int) -> None:
        self.writer.say(grammar.state_fact(self.rng, self.world.facts[index], self.plan.clause_rate))
        value = self.world.facts[index].value
        self.fact_told[index] = len(self.writer.tokens) - 1 - self.writer.num_tokens(value)

    def tell_home(self, index: int) -> None:
        home = self.world.homes[index]
        if home not in self.home_told:
            self.writer.say(grammar.state_home(home))
            self.home_told[home] = len(self.writer.tokens) - 1 - self.writer.num_tokens(home.place)

    def ask(self, index: int) -> None:
        """Asks a fact if it was told, in one of its ways, or the home it is about; then perhaps one more fact."""
        if index not in self.fact_told:
            return
        fact, home = self.world.facts[index], self.world.homes.get(index)
        self.asked.add(index)
        # Where an answer has named a home, it would be known from a few tokens back, without the cache. (Where it was
        # told again it may be, too: of every hundred questions in training three, in evaluation none.)
        is_open = home in self.home_told and home not in self.named
        if home is not None and is_open and self.rng.random() < HOME_SHARE:
            self._ask_about(home, index)
        elif self.rng.random() < self.plan.reminder_share:
            self._remind(index)
        else:
            kind = "place" if index in self.world.homes else "fact"
            self.writer.exchange(grammar.ask_fact(fact), kind, self.fact_told[index])
            if self.rng.random() < self.plan.follow_up_rate:
                self._follow_up(fact)

    def fill(self) -> None:
        """One thing for a gap: an old question or statement again, or a sentence that says nothing."""
        draw, told = self.rng.random(), list(self.fact_told)
        if told and draw < self.plan.repeat_rate + self.plan.remind_rate:
            index = told[int(self.rng.integers(len(told)))]
            if draw < self.plan.repeat_rate:
                self.ask(index)
            else:
                self._remind(index)
        else:
            self.writer.say(grammar.filler(self.rng))

    def _remind(self, index: int) -> None:
        home = self.world.homes.get(index)
        if home is not None and home in self.home_told and self.rng.random() < 0.5:
            self.writer.remind(grammar.remind_of_home(home), "home", self.home_told[home])
        else:
            kind = "reminder" if home is None else "place"
            self.writer.remind(grammar.remind_of_fact(self.world.facts[index]), kind, self.fact_told[index])

    def _ask_about(self, home: Home, index: int) -> None:
        """Asks for the fact through the home, for the home, or for both where the first answer leaves it open."""
        alone = self.plan.name_place and self.rng.random() < ALONE_SHARE
        if not alone:
            told_at = min(self.fact_told[index], self.home_told[home])
            exchange = grammar.ask_through(home, self.world.facts[index], name_place=self.plan.name_place)
            self.writer.exchange(exchange, "through", told_at)
        if alone or (not self.plan.name_place and self.rng.random() < BOTH_SHARE):
            self.writer.exchange(grammar.ask_home(home), "home", self.home_told[home])
        if self.plan.name_place:
            self.named.add(home)

    def _follow_up(self, fact: Fact) -> None:
        for index in self.rng.permutation(list(self.fact_told)):
            other = self.world.facts[int(index)]
            if int(index) in self.asked and not self.plan.repeat_rate:
                continue
            if other.attribute == fact.attribute and other.holder != fact.holder:
                exchange = grammar.follow_up_holder(other)
            elif other.holder == fact.holder and other.attribute != fact.attribute:
                exchange = grammar.follow_up_attribute(other)
            else:
                continue
            self.writer.exchange(exchange, "follow-up", self.fact_told[int(index)])
            self.asked.add(int(index))
            return

    def set_task(self) -> None:
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
            elif kind == "task":
                telling.set_task()
            elif kind == "fact":
                telling.tell_fact(index)
            else:
                telling.tell_home(index)
        else:
            telling.fill()
    answers = [one for one in telling.writer.answers if one.start + one.num_tokens <= plan.length]
    return Document(tokens[: plan.length], telling.writer.weights[: plan.length], answers)


def _schedule(rng: np.random.Generator, world: World, plan: Plan) -> list[tuple[float, str, int]]:
    """When each fact and home is told, and when each is asked: a heap of (token position, kind, index)."""
    events: list[tuple[float, str, int]] = []
    end = 0.97 * plan.length
    for index in range(len(world.facts)):
        told = rng.random() * plan.reading_share * plan.length
        events.append((told, "fact", index))
        latest = told
        if index in world.homes:
            home_told = rng.random() * plan.reading_share * plan.length
            events.append((home_told, "home", index))
            latest = max(told, home_told)
        if rng.random() < plan.asked_share:
            shortest = np.log(24.0)
            delay = np.exp(shortest + rng.random() * (np.log(end) - shortest))
            earliest = max(latest, plan.ask_after * plan.length)
            uniform = earliest + rng.random() * (end - earliest)
            asked = latest + delay if rng.random() < 0.4 and earliest <= latest + delay < end else uniform
            events.append((asked, "ask", index))
    num_tasks = int(rng.poisson(plan.task_rate * plan.length / TASK_TOKENS))
    events += [(rng.random() * end, "task", index) for index in range(num_tasks)]
    heapq.heapify(events)
    return events
