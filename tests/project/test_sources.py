"""Rules about the text of the project: docstrings, sizes, what kernels import, nothing tied to one machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hkv_jax", "pallas_kernels", "serving")
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")

MAX_FILE_LINES = 400
MAX_KERNEL_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 6

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    """Hand-written Python files below the folders."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if not GENERATED.search(path.name)]


def tracked_files() -> list[Path]:
    """What git tracks or would track; without git (a source archive), the places where text lives."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listing.returncode == 0:
        names = [name for name in listing.stdout.decode().split("\0") if name]
        return [path for path in (ROOT / name for name in names) if path.is_file()]
    suffixes = {".py", ".toml", ".txt", ".md", ".proto"}
    return [path for path in ROOT.rglob("*") if path.is_file() and path.suffix in suffixes]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions_of(path: Path) -> Iterator[tuple[str, FunctionNode]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, FunctionNode):
            yield f"{name_of(path)}:{node.lineno} {node.name}", node


def is_kernel(path: Path) -> bool:
    return path.is_relative_to(ROOT / "pallas_kernels")


def lines_of(function: FunctionNode) -> int:
    """Lines from `def` to the end, less the docstring: explaining more must not cost."""
    assert function.end_lineno is not None
    length = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        assert first.end_lineno is not None
        length -= first.end_lineno - first.lineno + 1
    return length


def parameters_of(function: FunctionNode) -> list[str]:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in {"self", "cls"}]


def test_every_module_says_what_it_owns() -> None:
    silent = [
        name_of(path)
        for path in python_files(*PACKAGES, "tools", "tests")
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent, f"these modules have no docstring: {silent}"


def test_files_stay_small() -> None:
    large = []
    for path in python_files(*PACKAGES, "tools", "tests"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = MAX_KERNEL_FILE_LINES if is_kernel(path) else MAX_FILE_LINES
        if lines > limit:
            large.append(f"{name_of(path)}: {lines} lines, at most {limit}")
    assert not large, f"split these files: {large}"


def test_functions_stay_small() -> None:
    large = [
        f"{where}: {lines_of(function)} lines"
        for path in python_files(*PACKAGES, "tools")
        for where, function in functions_of(path)
        if not is_kernel(path) and lines_of(function) > MAX_FUNCTION_LINES
    ]
    assert not large, f"functions have at most {MAX_FUNCTION_LINES} lines; split these: {large}"


def test_functions_take_few_parameters() -> None:
    greedy = []
    for path in python_files(*PACKAGES, "tools"):
        for where, function in functions_of(path):
            parameters = parameters_of(function)
            takes_refs = is_kernel(path) and any(name.endswith("_ref") for name in parameters)
            if len(parameters) > MAX_PARAMETERS and not takes_refs:
                greedy.append(f"{where}: {len(parameters)}")
    assert not greedy, f"functions take at most {MAX_PARAMETERS} parameters; these want a new type: {greedy}"


def imported_packages(path: Path) -> set[str]:
    """Top-level names of the absolute imports of a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_kernels_import_only_jax_and_numpy() -> None:
    allowed = {"jax", "numpy", "pallas_kernels", *sys.stdlib_module_names}
    extra = {name_of(path): sorted(imported_packages(path) - allowed) for path in python_files("pallas_kernels")}
    assert not any(extra.values()), f"pallas_kernels imports only jax and numpy: {extra}"


# Written in pieces, so that this file passes its own test.
TIED_TO_A_MACHINE = {
    "a path of somebody's machine": re.compile(r"(?<![\w.~}])/" + r"(work|root|home|Users)/\w"),
    "a package registry": re.compile(r"\b(pypi|pythonhosted|npmjs|crates)\.(org|io)\b|--(extra-)?index" + "-url"),
    "a temporary folder of one machine": re.compile(r"(?<![\w.~}])/" + r"tmp/[a-z]"),
}


@pytest.mark.parametrize("what", sorted(TIED_TO_A_MACHINE))
def test_no_file_is_tied_to_a_machine(what: str) -> None:
    pattern = TIED_TO_A_MACHINE[what]
    tied = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and reference arrays
        tied += [f"{name_of(path)}: {match.group()!r}" for match in pattern.finditer(text)]
    assert not tied, f"{what} is named in {tied}"
