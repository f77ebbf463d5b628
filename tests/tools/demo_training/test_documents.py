"""Documents say what they claim to: answers stand where they are marked, facts are told before they are asked, once."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from tools.demo_training import curriculum, documents, evaluation, grammar, vocabulary
from tools.demo_training.documents import Document
from tools.demo_training.plan import Plan
from tools.demo_training.questions import question_of
from tools.demo_training.tokenizer import WordEncoder, build
from tools.demo_training.world import make_world

ENCODER = WordEncoder()
WINDOW = 32


def written(seed: int = 0, **changes: object) -> Document:
    plan = Plan(**{"length": 1024, "num_facts": 10, "same_attribute": False, **changes})  # type: ignore[arg-type]
    return documents.write(np.random.default_rng(seed), ENCODER, plan)


def text(tokens: list[int]) -> str:
    return ENCODER.decode(tokens)


@pytest.mark.parametrize("same_attribute", [False, True])
def test_an_answer_is_what_was_told(same_attribute: bool) -> None:
    document = written(same_attribute=same_attribute, num_homes=12, reminder_share=0.6)
    kinds = ("fact", "follow-up", "reminder", "home", "place")
    asked = [one for one in document.answers if one.kind in kinds]
    assert {one.kind for one in asked} >= {"fact", "reminder", "home"}
    for answer in asked:
        said = document.tokens[answer.start : answer.start + answer.num_tokens]
        told = answer.start - answer.distance
        assert document.tokens[told : told + answer.num_tokens] == said
        assert answer.distance > 0


def test_a_whole_answer_is_the_models_turn() -> None:
    document = written(length=4096, num_homes=24, task_rate=0.2, follow_up_rate=0.5)
    opened, closed = (vocabulary.SPECIAL_TOKENS.index(mark) for mark in (vocabulary.MODEL, vocabulary.END))
    asked = [one for one in document.answers if closed in document.tokens[one.start :]]
    assert {one.kind for one in asked} >= {"fact", "through", "home", "follow-up", "copy"}
    for answer in asked:
        question = question_of(document, answer)
        assert question.prompt[-1] == opened and question.answer[-1] == closed
        assert len(question.answer) == answer.lead + answer.num_tokens + 2  # the period and the mark


def test_weights_mark_answers_and_nothing_else() -> None:
    document = written(task_rate=0.2, reminder_share=0.0)
    marked = {i for one in document.answers for i in range(one.start, one.start + one.num_tokens)}
    weighted = {index for index, weight in enumerate(document.weights) if weight > 0}
    assert marked <= weighted
    model_turn = vocabulary.SPECIAL_TOKENS.index(vocabulary.MODEL)
    for index in weighted - marked:  # the words of an answer before its value
        assert model_turn in document.tokens[index - 12 : index]


def test_a_document_is_as_long_as_it_should_be_and_the_same_for_a_seed() -> None:
    document = written(seed=3)
    assert len(document.tokens) == len(document.weights) == 1024
    assert document == written(seed=3) != written(seed=4)


def test_each_fact_is_asked_once_in_evaluation() -> None:
    for kind in evaluation.KINDS:
        for document in evaluation.evaluation_documents(2, 40, kind):
            asked = Counter(one.start - one.distance for one in document.answers if one.kind in ("fact", "follow-up"))
            assert max(asked.values()) == 1


def test_facts_of_one_attribute_differ_in_the_owner_alone() -> None:
    rng = np.random.default_rng(0)
    world = make_world(rng, Plan(length=256, num_facts=30, same_attribute=True))
    owners, things = zip(*(fact.holder.split("'s ") for fact in world.facts), strict=True)
    assert len({(fact.attribute, thing) for fact, thing in zip(world.facts, things, strict=True)}) == 1
    assert len(set(owners)) == 30


@pytest.mark.parametrize("same_attribute", [False, True])
def test_a_home_leads_to_the_place_of_its_fact(same_attribute: bool) -> None:
    plan = Plan(length=256, num_facts=20, same_attribute=same_attribute, alike=True, num_homes=10)
    world = make_world(np.random.default_rng(0), plan)
    for index, home in world.homes.items():
        assert world.facts[index].holder == f"the {home.place}"
    assert len({home.owner for home in world.homes.values()}) == 10
    about = Counter(world.facts[index].holder for index in world.homes)
    assert set(about.values()) == ({1} if same_attribute else {1, 2})
    assert len({(fact.holder, fact.attribute) for fact in world.facts}) == len(world.facts) == 20 + about.total()


def test_alike_facts_differ_in_one_word() -> None:
    """Owners are made of few pieces, and things have two attributes."""
    start_of = {start + end: start for start in vocabulary.NAME_STARTS for end in vocabulary.NAME_ENDS}

    def world(*, alike: bool, same_attribute: bool) -> list[grammar.Fact]:
        plan = Plan(length=256, num_facts=30, alike=alike, same_attribute=same_attribute)
        return make_world(np.random.default_rng(0), plan).facts

    starts = {
        alike: len({start_of[fact.holder.partition("'s ")[0]] for fact in world(alike=alike, same_attribute=True)})
        for alike in (False, True)
    }
    assert starts[True] <= 8 < 15 < starts[False]
    twice = {
        alike: sum(n > 1 for n in Counter(f.holder for f in world(alike=alike, same_attribute=False)).values())
        for alike in (False, True)
    }
    assert twice[True] >= 8
    assert twice[True] > 1.5 * twice[False]


def test_a_question_through_a_home_tells_nothing_of_the_place() -> None:
    document = written(num_homes=12, num_facts=2, same_attribute=True)
    through = [one for one in document.answers if one.kind == "through"]
    assert len(through) > 4
    for answer in through:
        near = text(document.tokens[answer.asked - 3 : answer.start])
        assert "'s home" in near
        assert not set(vocabulary.HOMES) & set(near.replace("?", " ").replace(".", " ").split())


def test_a_home_is_not_asked_for_once_an_answer_has_named_it() -> None:
    """Else it would be read from a few tokens back, and no damage to the cache would show."""
    homes = 0
    for seed in range(4):
        document = written(seed, num_homes=12, num_facts=2, alike=True)
        named: set[str] = set()
        for answer in document.answers:
            if answer.kind in ("home", "through"):
                owner = re.search(r"(\w+)'s home", text(document.tokens[answer.asked : answer.start]))
                assert owner and owner[1] not in named
                named.add(owner[1])
                homes += answer.kind == "home"
    assert homes > 4


@pytest.mark.parametrize("name_place", [False, True])
def test_the_answer_to_it_gives_the_fact_of_the_place(name_place: bool) -> None:
    document = written(num_homes=12, num_facts=2, same_attribute=True, name_place=name_place)
    said = text(document.tokens)
    through = [one for one in document.answers if one.kind == "through"]
    assert through
    for answer in through:
        question = text(document.tokens[answer.asked : answer.start])
        attribute, owner = question.partition("What is the ")[2].partition("'s home?")[0].split(" of ")
        place = said.partition(f"{owner}'s home is the ")[2].partition(".")[0]
        value = said.partition(f"The {attribute} of the {place}")[2].partition(".")[0].split()[-1]
        expected = f"{place}, is {value}" if name_place else value
        assert text(document.tokens[answer.start : answer.start + answer.num_tokens]).strip() == expected


def test_the_last_layer_is_copied_once_and_only_when_its_stage_begins() -> None:
    steps = [step for step in range(curriculum.total_steps()) if curriculum.begins_with_copy(step)]
    assert len(steps) == 1
    assert curriculum.stage_at(steps[0]) is not curriculum.stage_at(steps[0] - 1)


def test_the_first_global_layer_is_kept_for_homes_and_the_last_for_places() -> None:
    document = written(length=2048, num_homes=24, task_rate=0.4)
    gates = curriculum.draw_gates(np.random.default_rng(0), document, 1.0)
    expected = {"home": (1, 0), "place": (0, 1), "through": (1, 1), "fact": (1, 1), "copy": (0, 0), "count": (0, 0)}
    seen = set()
    for answer in document.answers:
        if answer.kind in expected:
            seen.add(answer.kind)
            span = gates[:, answer.asked : answer.start + answer.num_tokens]
            assert (span == np.array(expected[answer.kind])[:, None]).all(), answer
    assert seen == set(expected)
    assert (curriculum.draw_gates(np.random.default_rng(0), document, 0.0) == 1).all()


def test_names_and_values_of_evaluation_are_never_trained() -> None:
    for document in evaluation.evaluation_documents(1, 40, "mixed"):
        said = text(document.tokens)
        owners, values = set(re.findall(r"(\w+)'s ", said)), set(re.findall(r" is (\d{4})\.", said))
        assert len(owners) > 20 and owners <= set(vocabulary.names(held_out=True))
        assert len(values) > 40 and values <= set(vocabulary.values(held_out=True))


def test_a_copied_digit_is_read_from_exactly_a_window_back() -> None:
    copies = [one for one in written(task_rate=0.6, num_facts=2).answers if one.kind == "copy"]
    tokens = written(task_rate=0.6, num_facts=2).tokens
    assert copies
    for copy in copies:
        assert copy.num_tokens == grammar.COPIED_DIGITS
        source = copy.start - WINDOW
        # The token before the copied one attends to the source: window - 1 back.
        assert tokens[source : source + copy.num_tokens] == tokens[copy.start : copy.start + copy.num_tokens]


def test_a_clause_can_put_a_window_between_name_and_value() -> None:
    rng = np.random.default_rng(0)
    fact = grammar.Fact("Ada's box", "key", "4713")
    lengths = []
    for _ in range(300):
        tokens = ENCODER.encode(grammar.state_fact(rng, fact, 1.0))
        lengths.append(len(tokens) - len(ENCODER.encode(" 4713.")) - len(ENCODER.encode("The key of Ada")) + 1)
    assert max(lengths) == WINDOW - 1
    assert min(lengths) < WINDOW // 2


def test_ids_are_those_of_the_tokenizer() -> None:
    document = written(task_rate=0.2, num_homes=4)
    whole = build().encode(text(document.tokens), add_special_tokens=False)
    assert whole.ids == document.tokens


def test_half_of_the_documents_tell_one_attribute_in_every_stage() -> None:
    for stage in curriculum.STAGES:
        rng = np.random.default_rng(0)
        share = np.mean([curriculum.draw_plan(rng, stage).same_attribute for _ in range(400)])
        assert 0.4 < share < 0.6


def test_the_last_stages_ask_nothing_twice() -> None:
    assert max(stage.length for stage in curriculum.STAGES) == 4096
    first = next(index for index, stage in enumerate(curriculum.STAGES) if stage.length == 4096)
    assert all(stage.repeat_rate == stage.remind_rate == 0 for stage in curriculum.STAGES[first:])
