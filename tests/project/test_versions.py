"""The version is said once, and both constraints files pin all that the project brings."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path
from typing import Any, cast

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import hkv_jax

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Extras that are installed on the oldest versions too; the others are for tools, notebooks and TPU machines.
CONSTRAINED = {
    "constraints.txt": ("serving", "test", "dev", "notebook", "tpu"),
    "constraints-oldest.txt": ("serving", "test"),
}


def pins(file_name: str) -> dict[str, str]:
    """Distribution → version of a constraints file; every line must be an exact pin that holds everywhere."""
    pinned: dict[str, str] = {}
    for line in (ROOT / file_name).read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9a-z.]*)", line)
        assert match, f"{file_name}: {line!r} is not an exact pin"
        name = canonicalize_name(match[1])
        assert name not in pinned, f"{file_name}: {name} is pinned twice"
        pinned[name] = match[2]
    return pinned


def direct_requirements(extras: tuple[str, ...]) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    requirements = [Requirement(line) for line in lines]
    return [requirement for requirement in requirements if canonicalize_name(requirement.name) != "hkv-jax"]


def all_requirements(extras: tuple[str, ...]) -> set[str]:
    """Names of the direct requirements and, as far as they are installed here, of everything those bring."""
    found: set[tuple[str, str]] = set()
    waiting = direct_requirements(extras)
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), extra)
            if key in found:
                continue
            found.add(key)
            try:
                brought = importlib.metadata.requires(requirement.name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            environment = {**cast("dict[str, str]", default_environment()), "extra": extra}
            children = [Requirement(line) for line in brought]
            waiting += [child for child in children if child.marker is None or child.marker.evaluate(environment)]
    return {name for name, _ in found}


@pytest.mark.parametrize("file_name", sorted(CONSTRAINED))
def test_constraints_cover_everything_that_is_installed(file_name: str) -> None:
    missing = all_requirements(CONSTRAINED[file_name]) - set(pins(file_name))
    assert not missing, f"{file_name} must pin {sorted(missing)}"


@pytest.mark.parametrize("file_name", sorted(CONSTRAINED))
def test_pins_lie_in_the_ranges_of_the_project(file_name: str) -> None:
    pinned = pins(file_name)
    outside = [
        f"{requirement} excludes {pinned[canonicalize_name(requirement.name)]}"
        for requirement in direct_requirements(CONSTRAINED[file_name])
        if not requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])
    ]
    assert not outside, f"{file_name}: {outside}"


def test_the_oldest_set_is_the_lower_end_of_the_ranges() -> None:
    """What the ranges promise for the packages that set the pace is what the oldest run tests."""
    pinned = pins("constraints-oldest.txt")
    floors: dict[str, list[str]] = {}
    for requirement in direct_requirements(()):
        floors[canonicalize_name(requirement.name)] = [s.version for s in requirement.specifier if s.operator == ">="]
    for name in ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy"):
        assert floors[name] == [pinned[name]], f"{name}: promised {floors[name]}, tested {pinned[name]}"


def test_supported_pythons() -> None:
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.11.0")
    assert not SpecifierSet(PROJECT["requires-python"]).contains("3.10.9")
    assert sys.version_info >= (3, 11)


def test_the_version_is_said_once() -> None:
    assert "version" in PROJECT["dynamic"]
    assert importlib.metadata.version("hkv-jax") == hkv_jax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", hkv_jax.__version__)
