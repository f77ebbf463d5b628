"""The parts of a Markdown file that a command writes: what stands between two marks is replaced, the rest stays.

Owns: the marks. Must never: compute a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tools.demo_training.evaluation import Score


def replace_section(path: Path, name: str, lines: Sequence[str]) -> None:
    """Put ``lines`` between the marks of section ``name``.

    Raises:
        SystemExit: the file lacks the marks.
    """
    begin, end = f"<!-- {name}: written by tools/score_demo_model.py -->", f"<!-- end of {name} -->"
    text = path.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise SystemExit(f"{path} lacks the lines {begin} and {end}")
    path.write_text(before + begin + "\n\n" + "\n".join(lines) + "\n\n" + end + after, encoding="utf-8")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose first column is text and whose others are numbers."""
    rule = "|---|" + "---:|" * (len(headings) - 1)
    return [_row(headings), rule, *map(_row, rows)]


def percent(score: Score) -> str:
    """A share as in "99.1", in percent; a dash where nothing was asked."""
    return f"{100 * score.share:.1f}" if score.asked else "–"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
