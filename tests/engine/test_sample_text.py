"""Where the output of a sample ends: stop ids, stop strings, lengths; and what of it is text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hkv_jax.engine.output_processor import LivingRequest
from hkv_jax.engine.request import Request, Sequence
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.outputs import Completion, FinishReason, TokenLogprob
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.tiny_tokenizer import EOS, byte_level_tokenizer, write_tokenizer
from hkv_jax.tokenizer import Tokenizer

LIBRARY = byte_level_tokenizer()
PROMPT = LIBRARY.encode("the").ids


def ids_of(text: str) -> list[int]:
    return LIBRARY.encode(text, add_special_tokens=False).ids


EOS_ID = ids_of(EOS)[0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, LIBRARY)
    return Tokenizer.from_folder(folder)


def events_of(request: Request, ids: Iterable[int]) -> Iterable[TokenEvent]:
    """What the engine would say: it stops at a stop id, and at the length."""
    sequence = Sequence.create(request, 0, 0, 1000)
    for count, token_id in enumerate(ids, start=1):
        event = TokenEvent(sequence, token_id, TokenLogprob(token_id, -1.0))
        if token_id in request.stop_ids:
            event.finish_reason, event.stop_reason = FinishReason.STOP, token_id
        elif count == sequence.max_output_tokens:
            event.finish_reason = FinishReason.LENGTH
        yield event
        if event.finish_reason is not None:
            return


def run(tokenizer: Tokenizer, ids: Iterable[int], **params: Any) -> list[Completion]:
    """The pieces of a sample that draws ``ids``, until it ends."""
    request = Request.create("r", PROMPT, SamplingParams(**params), [EOS_ID])
    (sample,) = LivingRequest.create(request, tokenizer).samples
    pieces = []
    for event in events_of(request, ids):
        pieces.append(sample.push(event))
        if sample.ended:
            break
    return pieces


def text_of(pieces: list[Completion]) -> str:
    return "".join(piece.text for piece in pieces)


def test_a_stop_id_is_a_token_and_no_text(tokenizer: Tokenizer) -> None:
    pieces = run(tokenizer, [*ids_of(" cat"), EOS_ID, *ids_of(" sat")], skip_special_tokens=False)
    assert text_of(pieces) == " cat"
    last = pieces[-1]
    assert (last.token_ids, last.finish_reason, last.stop_reason) == ((EOS_ID,), FinishReason.STOP, EOS_ID)


def test_a_token_that_is_no_stop_id_is_text_when_special_tokens_are_wanted(tokenizer: Tokenizer) -> None:
    pieces = run(tokenizer, [EOS_ID, *ids_of(" cat")], ignore_eos=True, max_tokens=2, skip_special_tokens=False)
    assert text_of(pieces) == "</s> cat"


def test_the_end_by_length_brings_all_that_was_held_back(tokenizer: Tokenizer) -> None:
    unfinished = ids_of(" cat") + ids_of("🙂")[:2]
    pieces = run(tokenizer, unfinished, max_tokens=3, stop="cat and more")
    assert text_of(pieces) == " cat�"
    assert pieces[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("include", "text"), [(False, " the"), (True, " the cat")])
def test_a_stop_string_ends_the_text_and_the_tokens(tokenizer: Tokenizer, include: bool, text: str) -> None:
    pieces = run(tokenizer, ids_of(" the cat sat on"), stop=" cat", include_stop_str_in_output=include)
    assert text_of(pieces) == text
    assert [piece.token_ids for piece in pieces] == [(token_id,) for token_id in ids_of(" the cat")]
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == (FinishReason.STOP, " cat")
    assert all(piece.finish_reason is None for piece in pieces[:-1])


def test_a_stop_string_in_the_last_token_counts_before_the_length(tokenizer: Tokenizer) -> None:
    last = run(tokenizer, ids_of(" the cat"), stop="cat", max_tokens=2)[-1]
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, "cat")


def test_a_stop_string_does_not_begin_in_the_prompt(tokenizer: Tokenizer) -> None:
    assert text_of(run(tokenizer, ids_of(" cat"), stop="the cat", max_tokens=1)) == " cat"


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    ids = ids_of(" cat sat cat on")
    assert text_of(run(tokenizer, ids, stop="cat", min_tokens=1)) == " cat sat "
    assert text_of(run(tokenizer, ids, stop="cat")) == " "


def test_without_detokenising_there_is_no_text(tokenizer: Tokenizer) -> None:
    pieces = run(tokenizer, [*ids_of(" the cat"), EOS_ID], detokenize=False)
    assert text_of(pieces) == ""
    assert [piece.token_ids[0] for piece in pieces] == [*ids_of(" the cat"), EOS_ID]


def test_logprobs_come_with_their_tokens_and_only_when_asked_for(tokenizer: Tokenizer) -> None:
    ids = ids_of(" the cat")
    asked = run(tokenizer, ids, logprobs=0, max_tokens=2)
    assert [piece.logprobs for piece in asked] == [(TokenLogprob(token_id, -1.0),) for token_id in ids]
    assert [piece.logprobs for piece in run(tokenizer, ids, max_tokens=2)] == [None, None]


def test_an_abort_gives_what_was_held_back(tokenizer: Tokenizer) -> None:
    request = Request.create("r", PROMPT, SamplingParams(stop=("sat on",)))
    (sample,) = LivingRequest.create(request, tokenizer).samples
    pieces = [sample.push(event) for event in events_of(request, ids_of(" cat sat"))]
    assert text_of(pieces) == " cat "
    assert sample.abort() == Completion(0, "sat", (), None, FinishReason.ABORT)
    assert sample.ended


@given(
    ids=st.lists(st.integers(3, LIBRARY.get_vocab_size() - 1), min_size=1, max_size=30),
    stop=st.text(alphabet="th ca�", min_size=1, max_size=3),
)
def test_the_text_is_cut_where_the_whole_text_would_be_and_the_tokens_with_it(
    tokenizer: Tokenizer, ids: list[int], stop: str
) -> None:
    pieces = run(tokenizer, ids, stop=stop, max_tokens=len(ids))
    kept = [token_id for piece in pieces for token_id in piece.token_ids]
    whole = tokenizer.decode(ids)
    assert kept == ids[: len(kept)]
    if stop in whole:
        assert text_of(pieces) == whole[: whole.index(stop)]
        assert pieces[-1].stop_reason == stop
        # Without the last token it is not there.
        detokenizer = tokenizer.detokenizer(prompt=PROMPT)
        assert stop not in "".join(map(detokenizer.push, kept[:-1]))
    else:
        assert text_of(pieces) == whole
        assert kept == ids
