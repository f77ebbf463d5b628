"""The comparison with transformers on real models counts what agrees, and finds what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools import check_real_models
from tools.check_real_models import BEGIN, END, Comparison, compare, document
from tools.real_prompts import english


def reference(tokens: list[int], logprobs: list[float], margins: list[float]) -> dict[str, Any]:
    results = [{"tokens": tokens, "logprobs": logprobs, "margins": margins}]
    return {"prompts": [[1, 2, 3]], "results": results, "versions": {"transformers": "5", "torch": "2"}}


def test_agreement_counts_up_to_the_first_difference() -> None:
    theirs = reference([5, 6, 7, 8], [-1.0, -2.0, -3.0, -4.0], [0.5, 0.4, 0.01, 0.001])
    same = compare(theirs, [{"tokens": [5, 6, 7, 8], "logprobs": [-1.0, -2.0, -3.25, -4.0]}])
    assert same == [Comparison(3, 4, 4, 0.25, 0.001)] and same[0].identical
    # Beyond the first difference the two continue different texts: those numbers say nothing.
    other = compare(theirs, [{"tokens": [5, 6, 9, 8], "logprobs": [-1.5, -2.0, -9.0, -9.0]}])
    assert other == [Comparison(3, 4, 2, 0.5, 0.01)] and not other[0].identical


def test_a_missing_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare(reference([5, 6], [-1.0, -1.0], [1.0, 1.0]), [{"tokens": [5], "logprobs": [-1.0]}])


def test_the_table_replaces_what_stood_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "models.md"
    page.write_text(f"# before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(check_real_models, "DOCUMENT", page)
    theirs = reference([5, 6], [-1.0, -2.0], [0.5, 0.4])
    rows = compare(theirs, [{"tokens": [5, 9], "logprobs": [-1.0, -2.0]}])
    document({"some-model": rows}, {"some-model": theirs})
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# before\n{BEGIN}\n") and text.endswith(f"\n{END}\nafter\n")
    assert "| 3 | 1 of 2; 0e+00 |" in text and "old" not in text
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(SystemExit, match="lacks"):
        document({"some-model": rows}, {"some-model": theirs})


def test_stories_are_long_enough_and_differ() -> None:
    assert len(english(700).split()) >= 700
    assert len({english(100, story) for story in range(14)}) == 14
    assert english(300, 3) == english(300, 3)
    paragraphs = english(2500).split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
