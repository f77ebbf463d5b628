"""Documents say what they claim to: answers stand where they are marked, facts are told before they are asked, once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tools.demo_training import curriculum, documents, evaluation, grammar, vocabulary
from tools.demo_training.documents import Document, Plan
from tools.demo_training.tokenizer import WordEncoder, build

ENCODER = WordEncoder()
WINDOW = 32


def written(seed: int = 0, **changes: object) -> Document:
    plan = Plan(**{"length": 1024, "num_facts": 10, "same_attribute": False, **changes})  # type: ignore[arg-type]
    return documents.write(np.random.default_rng(seed), ENCODER, plan)


def text(tokens: list[int]) -> str:
    return ENCODER.decode(tokens)


@pytest.mark.parametrize("same_attribute", [False, True])
def test_an_answer_is_what_was_told(same_attribute: bool) -> None:
    document = written(same_attribute=same_attribute, relation_share=0.5)
    asked = [one for one in document.answers if one.kind in ("fact", "follow-up", "reminder", "relation")]
    assert asked
    for answer in asked:
        said = document.tokens[answer.start : answer.start + answer.num_tokens]
        told = answer.start - answer.distance
        assert document.tokens[told : told + answer.num_tokens] == said
        assert answer.distance > 0


def test_weights_mark_answers_and_nothing_else() -> None:
    document = written(task_rate=0.2)
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
    world = documents.make_world(rng, Plan(length=256, num_facts=30, same_attribute=True))
    assert len({(fact.attribute, fact.thing) for fact in world.facts}) == 1
    assert len({fact.owner for fact in world.facts}) == 30


def test_a_relation_leads_to_the_owner_of_its_fact() -> None:
    plan = Plan(length=256, num_facts=20, same_attribute=False, relation_share=0.5)
    world = documents.make_world(np.random.default_rng(0), plan)
    assert len(world.relations) == 10
    owners = {fact.owner for fact in world.facts}
    for index, relation in world.relations.items():
        assert relation.other == world.facts[index].owner
        assert relation.owner not in owners


def test_names_and_values_of_evaluation_are_never_trained() -> None:
    trained = set(vocabulary.names(held_out=False)) | set(vocabulary.values(held_out=False))
    for document in evaluation.evaluation_documents(1, 40, "mixed"):
        for answer in document.answers:
            said = text(document.tokens[answer.start : answer.start + answer.num_tokens]).strip()
            if answer.kind in ("fact", "through", "follow-up", "relation"):
                assert said not in trained


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
    fact = grammar.Fact("Ada", "box", "key", "4713")
    lengths = []
    for _ in range(300):
        tokens = ENCODER.encode(grammar.state_fact(rng, fact, 1.0))
        lengths.append(len(tokens) - len(ENCODER.encode(" 4713.")) - len(ENCODER.encode("The key of Ada")) + 1)
    assert max(lengths) == WINDOW - 1
    assert min(lengths) < WINDOW // 2


def test_ids_are_those_of_the_tokenizer() -> None:
    document = written(task_rate=0.2, relation_share=0.4)
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
