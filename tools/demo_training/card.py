"""The parts of a Markdown file that a command writes: what stands between two marks is replaced, the rest stays.

Owns: the marks. Must never: compute a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tools.demo_training.evaluation import Score


def prepare(path: Path, names: Sequence[str]) -> None:
    """See that sections ``names`` can be written, before anything is measured; a card that is missing is begun.

    Raises:
        SystemExit: the file lacks the marks of a section.
    """
    if not path.exists():
        sections = [f"{_begin(name)}\n\n{_end(name)}\n" for name in names]
        path.write_text("\n".join(["# Scores\n", *sections]), encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    for name in names:
        if _begin(name) not in text or _end(name) not in text.partition(_begin(name))[2]:
            raise SystemExit(f"{path} lacks the lines {_begin(name)} and {_end(name)}")


def replace_section(path: Path, name: str, lines: Sequence[str]) -> None:
    """Put ``lines`` between the marks of section ``name``, which ``prepare`` has seen."""
    begin, end = _begin(name), _end(name)
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    path.write_text(before + begin + "\n\n" + "\n".join(lines) + "\n\n" + end + after, encoding="utf-8")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose first column is text and whose others are numbers."""
    rule = "|---|" + "---:|" * (len(headings) - 1)
    return [_row(headings), rule, *map(_row, rows)]


def percent(score: Score) -> str:
    """A share as in "99.1", in percent; a dash where nothing was asked."""
    return f"{100 * score.share:.1f}" if score.asked else "–"


def _begin(name: str) -> str:
    return f"<!-- {name}: written by tools/score_demo_model.py -->"


def _end(name: str) -> str:
    return f"<!-- end of {name} -->"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
