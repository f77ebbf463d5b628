"""Stop strings are found wherever the text is cut, and only what may become one is held back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hkv_jax.tokenizer import StopScanner, StopStrings

TEXT = st.text(alphabet="ab<|", max_size=40)
STRINGS = st.lists(st.text(alphabet="ab<|", min_size=1, max_size=6), min_size=1, max_size=5)


def scan(strings: list[str], pieces: list[str], *, include: bool = False) -> tuple[str, str | None]:
    """Text and matched string of pieces that arrive one after the other."""
    scanner = StopScanner(StopStrings(strings), include=include)
    text = ""
    for piece in pieces:
        text += scanner.push(piece)
        if scanner.matched is not None:
            return text, scanner.matched
    return text + scanner.flush(), None


def expected(strings: list[str], text: str) -> tuple[int, str] | None:
    """End and string of the match that is complete first, the longest of those; by trying everything."""
    for end in range(1, len(text) + 1):
        found = [string for string in strings if text[:end].endswith(string)]
        if found:
            return end, max(found, key=len)
    return None


@given(strings=STRINGS, text=TEXT, cuts=st.lists(st.integers(0, 40), max_size=6), include=st.booleans())
def test_finds_what_trying_everything_finds_however_the_text_is_cut(
    strings: list[str], text: str, cuts: list[int], include: bool
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    match = expected(strings, text)
    if match is None:
        assert scan(strings, pieces, include=include) == (text, None)
    else:
        end, string = match
        kept = text[:end] if include else text[: end - len(string)]
        assert scan(strings, pieces, include=include) == (kept, string)


@given(strings=STRINGS, text=TEXT)
def test_holds_back_exactly_what_may_become_a_stop_string(strings: list[str], text: str) -> None:
    scanner = StopScanner(StopStrings(strings), include=False)
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += scanner.push(character)
        if scanner.matched is not None:
            return
        beginnings = [string[:size] for string in strings for size in range(1, len(string))]
        held = max((len(start) for start in beginnings if text[:end].endswith(start)), default=0)
        assert shown == text[: end - held]


@pytest.mark.parametrize(
    ("strings", "pieces", "kept", "matched"),
    [
        (["</s>"], ["Paris<", "/s", "><more"], "Paris", "</s>"),
        (["ab", "abc"], ["xabc"], "x", "ab"),  # complete first
        (["b", "ab"], ["xab"], "x", "ab"),  # complete at once: the longest
        (["aab"], ["aa", "aab"], "aa", "aab"),  # a false start inside the match
        (["no"], ["yes n"], "yes n", None),
    ],
)
def test_examples(strings: list[str], pieces: list[str], kept: str, matched: str | None) -> None:
    assert scan(strings, pieces) == (kept, matched)


def test_what_is_complete_while_not_armed_does_not_count() -> None:
    scanner = StopScanner(StopStrings(["ab"]), include=False)
    assert scanner.push("ab", armed=False) == ""
    assert scanner.push("x", armed=False) == "abx"
    assert scanner.push("a", armed=False) == ""
    assert scanner.push("b") == ""
    assert scanner.matched == "ab"


def test_a_long_stop_string_costs_no_more_a_character_than_a_short_one() -> None:
    """The automaton takes at most two moves a character on average; trying every length would take a thousand."""
    strings = StopStrings(["a" * 1000 + "b"])
    moves = 0
    look_up = strings.step

    def counted(state: int, character: str) -> int:
        nonlocal moves
        following = look_up(state, character)
        moves += 1 + max(0, strings.depths[state] + 1 - strings.depths[following])
        return following

    strings.step = counted  # type: ignore[method-assign]
    scanner = StopScanner(strings, include=False)
    for _ in range(5000):
        scanner.push("a")
    assert moves <= 2 * 5000
