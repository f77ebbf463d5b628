"""Training and scoring from the command line: what is wrong is said before minutes of work, and a card is filled in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools.demo_training.tiny_shape import TINY
from tools import score_demo_model, train_demo_model
from tools.demo_training import card, curriculum, evaluation, loop, model, scoring
from tools.demo_training.curriculum import Stage


def run(monkeypatch: pytest.MonkeyPatch, main: object, *arguments: object) -> int:
    """The exit code of a command."""
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    try:
        return int(main())  # type: ignore[operator]
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1


def model_folder(folder: Path, seed: int = 0) -> Path:
    model.save(folder, TINY, model.initial_parameters(TINY, seed))
    report = {"step": 20, "length": 64, "loss": 4.5, "fact": 0.25}
    (folder / scoring.CURVE).write_text(json.dumps({"seed": seed, "curve": [report]}))
    return folder


def test_training_exports_what_scoring_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "default_shape", lambda: TINY)
    stages = (Stage(64, 1, 2, 0.0, 0.0, 0.5),)
    monkeypatch.setattr(curriculum, "STAGES", stages)
    monkeypatch.setattr(loop.train, "__defaults__", (stages, lambda: False))
    folder = tmp_path / "model"
    assert run(monkeypatch, train_demo_model.main, tmp_path / "run", "--seed", 3, "--export", folder) == 0
    assert model.load(folder)[0] == TINY
    assert json.loads((folder / scoring.CURVE).read_text())["seed"] == 3
    assert run(monkeypatch, score_demo_model.main, "curve", "--model", folder) == 0
    assert "| 2 | 64 |" in (folder / scoring.CARD).read_text()


def test_folders_that_cannot_be_written_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("it trains"))
    (tmp_path / "file").write_text("")
    assert run(monkeypatch, train_demo_model.main, tmp_path / "file") == 2
    assert run(monkeypatch, train_demo_model.main, tmp_path / "run", "--export", tmp_path / "file") == 2
    assert capsys.readouterr().err.count("name a folder that can be written") == 2
    assert run(monkeypatch, train_demo_model.main, tmp_path / "run", "--seed", -1) == 2
    assert "--seed must be at least 0, is -1" in capsys.readouterr().err


def test_what_scoring_lacks_is_said_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "score", lambda *_: pytest.fail("it measures"))
    folder = model_folder(tmp_path / "model")
    assert run(monkeypatch, score_demo_model.main, "recall", "--model", folder, "--documents", 0) == 2
    assert "--documents must be at least 4, is 0" in capsys.readouterr().err
    assert run(monkeypatch, score_demo_model.main, "seeds", "--model", folder) == 2
    assert run(monkeypatch, score_demo_model.main, "seeds", "--model", folder, "--other", tmp_path / "none") == 2
    assert f"{tmp_path / 'none'} has no config.json" in capsys.readouterr().err
    (folder / scoring.CARD).write_text("# A card without marks\n")
    assert run(monkeypatch, score_demo_model.main, "recall", "--model", folder) == 1
    assert (folder / scoring.CARD).read_text() == "# A card without marks\n"


@pytest.mark.slow
def test_a_model_that_knows_nothing_misses_every_goal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scoring, "FACT_COUNTS", (12,))
    monkeypatch.setattr(evaluation.score, "__defaults__", ((12,),))
    folder, other = model_folder(tmp_path / "model"), model_folder(tmp_path / "other", seed=1)
    parts = ("recall", "seeds", "--model", folder, "--other", other, "--documents", 4)
    assert run(monkeypatch, score_demo_model.main, *parts) == 1
    said = capsys.readouterr().err
    assert "4 documents, mixed, 12 facts" in said
    assert "recall: a goal is MISSED" in said
    assert "seeds: goals met" in said  # both know nothing
    written = (folder / scoring.CARD).read_text()
    assert "| mixed, 12 facts | 0.0 (" in written
    assert "seed 0 (shipped) | seed 1" in written


def test_a_section_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    card.prepare(path, ["recall", "curve"])
    card.replace_section(path, "curve", ["old"])
    path.write_text("before\n" + path.read_text() + "after\n")
    card.replace_section(path, "curve", ["new"])
    written = path.read_text()
    assert written.startswith("before\n") and written.endswith("after\n")
    assert "new" in written and "old" not in written
    with pytest.raises(SystemExit, match="lacks the lines <!-- damage"):
        card.prepare(path, ["damage"])
