"""The environment and the weight files of llama.cpp, which has to be built from source.

Owns: building it, converting for it, and saying why that failed. Must never: touch the environment it is called from.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tools.throwaway_env import run_in, say

REQUIREMENTS = ("llama-cpp-python==0.3.36", "gguf==0.19.0")
# Its own threads instead of OpenMP's; everything the CPU can do. The rest of its defaults stay.
CMAKE_ARGS = "-DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF"
SECONDS_BETWEEN_REPORTS = 30.0
CONVERT = Path(__file__).with_name("write_gguf.py")


class BuildFailedError(Exception):
    """llama.cpp is not to be had on this machine; the message says why, in one line."""


def llama_python(folder: Path, log: Path) -> Path:
    """The interpreter of an environment with llama-cpp-python and gguf; built when ``folder`` has none.

    Raises:
        BuildFailedError: it could not be built; ``log`` has everything the attempt printed.
    """
    python = folder / "bin" / "python"
    if _works(python):
        return python
    say(f"building {REQUIREMENTS[0]} from source (5 to 60 minutes; a compiler and cmake are needed)")
    if subprocess.run([sys.executable, "-m", "venv", str(folder)], check=False).returncode:
        raise BuildFailedError("an environment could not be made")
    _install(python, log)
    if not _works(python):
        raise BuildFailedError("it was built, but cannot be imported")
    return python


def gguf_file(python: Path, model: Path, folder: Path, dtype: str) -> Path:
    """The weights of ``model`` as a GGUF file in ``folder``, written when it is not there.

    Raises:
        BuildFailedError: they could not be converted.
    """
    file = folder / f"{model.name}-{dtype}.gguf"
    if not file.exists():
        say(f"writing {file.name}")
        try:
            run_in(python, [CONVERT, model, file, dtype])
        except SystemExit as error:
            raise BuildFailedError(f"{model.name} could not be converted to {dtype}") from error
    return file


def _works(python: Path) -> bool:
    if not python.exists():
        return False
    done = subprocess.run([str(python), "-c", "import llama_cpp, gguf"], capture_output=True, check=False)
    return done.returncode == 0


def _install(python: Path, log: Path) -> None:
    """``pip install``, telling from its log how far the compiler is.

    Raises:
        BuildFailedError: it failed.
    """
    command = [str(python), "-m", "pip", "install", "--verbose", "--disable-pip-version-check", *REQUIREMENTS]
    environment = {**os.environ, "CMAKE_ARGS": CMAKE_ARGS}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            began = told = time.monotonic()
            while process.poll() is None:
                time.sleep(0.5)
                if time.monotonic() - told >= SECONDS_BETWEEN_REPORTS:
                    told = time.monotonic()
                    say(f"  {(told - began) / 60:.1f} minutes, compiled: {compiled(log) or 'nothing yet'}")
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise BuildFailedError(f"pip failed with status {process.returncode}: {first_error(log)}")


def compiled(log: Path) -> str:
    """How far ninja is by its own count, as ``12/140``; empty before its first line."""
    found = re.findall(r"^\s*\[(\d+/\d+)\]", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found[-1] if found else ""


def first_error(log: Path) -> str:
    """The line of the log that most likely says what is wrong."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    telling = [line.strip() for line in lines if re.search(r"\b(fatal )?error\b[:!]?", line, re.IGNORECASE)]
    return telling[0][:200] if telling else "no line of its log says error"
