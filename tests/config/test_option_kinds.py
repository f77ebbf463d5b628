"""Values of options: the same strictness from Python, TOML, the command line and the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hkv_jax.config import option_kinds as kinds

NO_COUNT = [
    *(0, -5, 1.0, 1e3, True, False, [], {}, b"5", float("nan"), "0", "-5", "abc", "1e3", "", " ", " 5", "5 ", "+5"),
    *("1_000", "1,000", "0x10", "05", "5.0", "٥", "９", "1" * 5000),
]


@pytest.mark.parametrize("value", NO_COUNT)
def test_no_counts(value: Any) -> None:
    with pytest.raises(kinds.NotAcceptedError):
        kinds.count().parse(value)


@pytest.mark.parametrize(
    ("value", "count"), [(1, 1), ("1", 1), ("8192", 8192), (np.int64(7), 7), (2**31 - 1, 2**31 - 1)]
)
def test_counts(value: Any, count: int) -> None:
    parsed = kinds.count().parse(value)
    assert parsed == count
    assert type(parsed) is int


def test_a_count_has_a_limit() -> None:
    assert kinds.count(high=8).parse("8") == 8
    for value in (9, "9", 2**40):
        with pytest.raises(kinds.NotAcceptedError):
            kinds.count(high=8).parse(value)
    assert "up to 8" in kinds.count(high=8).accepts


@pytest.mark.parametrize(
    ("value", "num_bytes"),
    [
        *((1, 1), ("1", 1), (4096, 4096), ("2GiB", 2**31), ("512MiB", 2**29), ("3kib", 3072), ("1 TiB", 2**40)),
        *(("1.5GiB", 3 * 2**29), ("0.5KiB", 512), ("9007199254740993", 9007199254740993)),
    ],
)
def test_memory(value: Any, num_bytes: int) -> None:
    assert kinds.memory().parse(value) == num_bytes


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 1.5, 1e9, True, None, "", "0", "0GiB", "-1GiB", "1e9", "1.5", "2GB", "2G", "GiB", "2 Gi B", "2GiB "),
        *("0.0001KiB", "9" * 400, "9" * 400 + ".5GiB", "99999999TiB", ".5GiB", "٢GiB"),
    ],
)
def test_no_memory(value: Any) -> None:
    with pytest.raises(kinds.NotAcceptedError):
        kinds.memory().parse(value)


@pytest.mark.parametrize(
    ("value", "share"), [(0.5, 0.5), ("0.5", 0.5), (1, 1.0), ("1", 1.0), (".25", 0.25), ("1.0", 1.0)]
)
def test_fractions(value: Any, share: float) -> None:
    assert kinds.fraction().parse(value) == share


@pytest.mark.parametrize(
    "value", [0, 0.0, -0.5, 1.1, "1.1", 90, "90%", "", "abc", "nan", "inf", float("nan"), True, "5e-1", None, "9" * 400]
)
def test_no_fractions(value: Any) -> None:
    with pytest.raises(kinds.NotAcceptedError):
        kinds.fraction().parse(value)


@pytest.mark.parametrize(
    ("value", "seconds"), [(30, 30.0), ("30", 30.0), (0.25, 0.25), (".25", 0.25), (86_400, 86_400.0)]
)
def test_seconds(value: Any, seconds: float) -> None:
    parsed = kinds.seconds().parse(value)
    assert parsed == seconds
    assert type(parsed) is float


@pytest.mark.parametrize(
    "value", [-1, "-1", 86_401, "86400.5", "30s", "", "1e3", "nan", float("nan"), float("inf"), "inf", True, None, []]
)
def test_no_seconds(value: Any) -> None:
    for kind in (kinds.seconds(), kinds.seconds(zero="at once")):
        with pytest.raises(kinds.NotAcceptedError):
            kind.parse(value)


def test_no_time_at_all_is_accepted_only_where_it_means_something() -> None:
    for value in (0, 0.0, "0"):
        assert kinds.seconds(zero="at once").parse(value) == 0.0
        with pytest.raises(kinds.NotAcceptedError):
            kinds.seconds().parse(value)


def test_switches() -> None:
    kind = kinds.switch()
    for value, parsed in ((True, True), (False, False), ("true", True), ("false", False)):
        assert kind.parse(value) is parsed
    for other in (1, 0, "yes", "True", "", None, 1.0):
        with pytest.raises(kinds.NotAcceptedError):
            kind.parse(other)


@pytest.mark.parametrize(
    ("value", "sizes"),
    [
        *((32, {"all": 32}), ("32", {"all": 32}), ("global=32,sliding=16", {"global": 32, "sliding": 16})),
        *(
            ("sliding_w128=8", {"sliding_w128": 8}),
            ({"global": 64}, {"global": 64}),
            ({"global": "64"}, {"global": 64}),
        ),
        *(("global=32, sliding=16", {"global": 32, "sliding": 16}), ("all=32,sliding=8", {"all": 32, "sliding": 8})),
    ],
)
def test_block_sizes(value: Any, sizes: dict[str, int]) -> None:
    assert kinds.block_sizes().parse(value) == sizes


@pytest.mark.parametrize(
    "value",
    [
        *(0, "0", "", "global", "global=", "=32", "global=32,", "global=32,global=16", "global=1e3", "global:32", {}),
        *({"global": 0}, {3: 32}, {"": 32}, {"global": 16.0}, "Global=32", "global=32;sliding=16", [32], 2**40),
    ],
)
def test_no_block_sizes(value: Any) -> None:
    with pytest.raises(kinds.NotAcceptedError):
        kinds.block_sizes().parse(value)


def test_choices_are_exact() -> None:
    kind = kinds.choice("xla", "pallas")
    assert kind.parse("xla") == "xla"
    assert kind.choices == ("xla", "pallas")
    for value in ("XLA", "xl", "", None, 1, True):
        with pytest.raises(kinds.NotAcceptedError):
            kind.parse(value)


def test_folders() -> None:
    assert kinds.folder().parse("models/x") == Path("models/x")
    assert kinds.folder().parse(Path("y")) == Path("y")
    assert kinds.folder().parse("~/x") == Path.home() / "x"
    named = kinds.folder({"demo": Path("/bundled")})
    assert named.parse("demo") == Path("/bundled")
    assert [named.parse(path) for path in ("./demo", Path("demo"))] == [Path("demo"), Path("demo")]
    for value in ("", 3, None, True, b"x"):
        with pytest.raises(kinds.NotAcceptedError):
            kinds.folder().parse(value)
