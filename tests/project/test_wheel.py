"""The wheel: exactly the three packages, whole, with the command and the licence."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

import hkv_jax

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hkv_jax", "pallas_kernels", "serving")
INGREDIENTS = ("pyproject.toml", "README.md", "LICENSE")


def package_files(root: Path) -> set[str]:
    """Every file of the three packages, caches left out."""
    return {
        path.relative_to(root).as_posix()
        for package in PACKAGES
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources (a build writes beside them), with folders that must stay out of the wheel."""
    copy = tmp_path_factory.mktemp("source")
    for name in INGREDIENTS:
        shutil.copy(ROOT / name, copy / name)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for outsider in ("tests", "tools"):
        (copy / outsider).mkdir()
        (copy / outsider / "__init__.py").write_text("")
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as pip builds it, without a network: with the installed setuptools."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(target), str(source)], check=True, capture_output=True, text=True)
    [path] = target.glob("*.whl")
    return zipfile.ZipFile(path)


def metadata_folder() -> str:
    return f"hkv_jax-{hkv_jax.__version__}.dist-info"


def test_the_wheel_holds_exactly_the_three_packages(wheel: zipfile.ZipFile) -> None:
    top_level = {name.partition("/")[0] for name in wheel.namelist()}
    assert top_level == {*PACKAGES, metadata_folder()}


def test_the_packages_are_whole(wheel: zipfile.ZipFile, source: Path) -> None:
    packed = {name for name in wheel.namelist() if name.partition("/")[0] in PACKAGES}
    assert packed == package_files(source)


def test_each_package_declares_its_types(wheel: zipfile.ZipFile) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheel.namelist())


def test_the_command_and_the_metadata(wheel: zipfile.ZipFile) -> None:
    entry_points = ConfigParser()
    entry_points.read_string(wheel.read(f"{metadata_folder()}/entry_points.txt").decode())
    assert dict(entry_points["console_scripts"]) == {"hkv-jax": "serving.cli:main"}
    metadata = Parser().parsestr(wheel.read(f"{metadata_folder()}/METADATA").decode())
    assert metadata["Name"] == "hkv-jax"
    assert metadata["Version"] == hkv_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{metadata_folder()}/licenses/LICENSE" in wheel.namelist()
