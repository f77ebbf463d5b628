"""A Python environment for commands that need torch and transformers, kept apart from the project's own.

Owns: making, reusing and removing it. Must never: import anything beyond the standard library, or touch the environment
it is called from.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

# An exact release, since a range would let pip choose a build for CUDA of several GB.
TORCH = "torch==2.13.0"
TRANSFORMERS = ("transformers==5.23.*", "safetensors>=0.5")


def say(text: str) -> None:
    """Tell progress on stderr, so that stdout stays for results."""
    print(text, file=sys.stderr, flush=True)


def has(*modules: str) -> bool:
    """Whether this interpreter can import all of the top-level modules."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


@contextlib.contextmanager
def reference_python(requirements: Sequence[str], *, folder: Path | None = None, keep: bool = False) -> Iterator[Path]:
    """Yield the interpreter of an environment that holds torch, transformers and ``requirements``.

    Args:
        requirements: what pip installs beside torch and transformers.
        folder: where it lies; one that exists is brought up to date and stays. ``None``: a temporary folder, removed at
            the end.
        keep: leave the temporary folder and say where it is.

    Raises:
        SystemExit: the environment cannot be made; the message is pip's own.
    """
    place = folder or Path(tempfile.mkdtemp(prefix="hkv-jax-reference-"))
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    try:
        if not python.exists():
            say(f"making an environment in {place}")
            _run([sys.executable, "-m", "venv", str(place)])
        say(f"installing {TORCH} (about 200 MB; minutes)")
        pip_install(python, [TORCH])
        say(f"installing {', '.join((*TRANSFORMERS, *requirements))}")
        pip_install(python, [TORCH, *TRANSFORMERS, *requirements])
        yield python
    finally:
        if folder is None and keep:
            say(f"the environment stays in {place}")
        elif folder is None:
            shutil.rmtree(place, ignore_errors=True)


def pip_install(python: Path, arguments: Sequence[str]) -> None:
    """``pip install`` into the environment of ``python``.

    Raises:
        SystemExit: pip failed; with its exit status.
    """
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])


def run_in(python: Path, command: Sequence[str | Path]) -> None:
    """Run ``python command...``; its output goes where this command's goes.

    Raises:
        SystemExit: it failed; with its exit status.
    """
    # A hub would be asked for files the folders already hold.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    _run([str(python), *map(str, command)], environment)


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    status = subprocess.run(command, env=environment, check=False).returncode
    if status:
        say(f"failed with status {status}: {' '.join(command)}")
        raise SystemExit(status)
