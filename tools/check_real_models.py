"""Compare greedy tokens of hkv-jax and of transformers on the real models, both in float32 on the CPU.

    python tools/check_real_models.py [NAME ...] [--venv FOLDER] [--new-tokens N] [--again]

The folders come from tools/make_real_models.py; all that are there are checked when no name is given. Prompts are of 10
to 3,000 tokens, below, at and above the windows; hkv-jax runs them all at once. The reference runs in an environment of
its own, and its result is kept below .cache/ (--again makes it anew). When all models are checked, the table in
docs/models.md is replaced. Exit status 1 when a token differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.make_real_models import NAMES, is_made  # noqa: E402
from tools.real_prompts import english  # noqa: E402
from tools.throwaway_env import reference_python, run_in, say  # noqa: E402

LENGTHS = (10, 64, 200, 255, 256, 257, 400, 511, 512, 513, 800, 1024, 2000, 3000)
DOCUMENT = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- written by tools/check_real_models.py: begin -->", "<!-- end -->"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One prompt's outcome: how many tokens agree before the first that does not, and how close the numbers are."""

    prompt_tokens: int
    new_tokens: int
    agreeing: int
    logprob_difference: float
    smallest_margin: float

    @property
    def identical(self) -> bool:
        """Whether every token agrees."""
        return self.agreeing == self.new_tokens


def main() -> int:
    """Parse the command line, run both sides, tell and document the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="where the folders are (default: models)")
    parser.add_argument("--venv", type=Path, help="environment to make or reuse for transformers, and keep")
    parser.add_argument("--new-tokens", type=int, default=48, help="greedy tokens a prompt (default 48)")
    parser.add_argument("--again", action="store_true", help="run the reference even if its result is kept")
    options = parser.parse_args()
    folders = [options.models / name for name in options.names or NAMES]
    missing = [folder.name for folder in folders if not is_made(folder)]
    if options.names and missing:
        parser.error(f"{', '.join(missing)} not in {options.models}; tools/make_real_models.py makes it")
    folders = [folder for folder in folders if folder.name not in missing]
    if not folders:
        parser.error(f"no model in {options.models}; tools/make_real_models.py makes them")
    references = run_references(folders, options)
    outcome = {}
    for folder in folders:
        outcome[folder.name] = compare(references[folder.name], run_here(folder, references[folder.name]))
        for row in outcome[folder.name]:
            say(f"{folder.name}: {describe(row)}")
    if set(outcome) == set(NAMES):
        document(outcome, references)
    return 0 if all(row.identical for rows in outcome.values() for row in rows) else 1


def run_references(folders: Sequence[Path], options: argparse.Namespace) -> dict[str, Any]:
    """The kept results of transformers, and new ones for the folders that have none for just these prompts."""
    kept = ROOT / ".cache" / "real_reference"
    kept.mkdir(parents=True, exist_ok=True)
    asked: dict[Path, Path] = {}
    results: dict[str, Path] = {}
    for folder in folders:
        question = json.dumps({"new_tokens": options.new_tokens, "prompts": prompts_for(folder)})
        weights = (folder / "model.safetensors").stat()
        identity = f"{question} {(folder / 'config.json').read_text(encoding='utf-8')} {weights.st_size}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        results[folder.name] = kept / f"{folder.name}-{digest}.json"
        if options.again or not results[folder.name].exists():
            asked[folder] = kept / f"{folder.name}-{digest}.prompts.json"
            asked[folder].write_text(question, encoding="utf-8")
    if asked:
        with reference_python(("accelerate",), folder=options.venv) as python:
            for folder, question_path in asked.items():
                command = [ROOT / "tools" / "real_reference.py", folder, question_path, results[folder.name]]
                run_in(python, command)
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in results.items()}


def prompts_for(folder: Path) -> list[list[int]]:
    """One prompt of exactly each length, each of another story."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(english(length, story)).ids[:length] for story, length in enumerate(LENGTHS)]


def run_here(folder: Path, reference: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens and logprobs of hkv-jax for the reference's prompts, all in one batch."""
    # float32 on the CPU is what the reference is; jax is told before it is imported.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from hkv_jax import LLM, SamplingParams

    new_tokens = reference["new_tokens"]
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, logprobs=0, detokenize=False)
    longest = max(map(len, reference["prompts"]))
    with LLM(folder, dtype="float32", max_model_len=longest + new_tokens, max_num_seqs=8) as llm:
        started = time.perf_counter()
        outputs = llm.generate(reference["prompts"], params)
        say(f"{folder.name}: hkv-jax, {len(outputs)} prompts: {time.perf_counter() - started:.0f} s")
    completions = [output.outputs[0] for output in outputs]
    return [
        {"tokens": list(done.token_ids), "logprobs": [item.logprob for item in done.logprobs or ()]}
        for done in completions
    ]


def compare(reference: dict[str, Any], here: list[dict[str, Any]]) -> list[Comparison]:
    """Prompt by prompt; numbers are compared as long as the tokens agree."""
    rows = []
    for prompt, theirs, ours in zip(reference["prompts"], reference["results"], here, strict=True):
        pairs = zip(theirs["tokens"], ours["tokens"], strict=True)
        agreeing = next((index for index, (a, b) in enumerate(pairs) if a != b), len(theirs["tokens"]))
        both = zip(theirs["logprobs"][:agreeing], ours["logprobs"][:agreeing], strict=True)
        difference = max((abs(a - b) for a, b in both), default=0.0)
        margin = min(theirs["margins"][: agreeing + 1])
        rows.append(Comparison(len(prompt), len(theirs["tokens"]), agreeing, difference, margin))
    return rows


def describe(row: Comparison) -> str:
    """One line for the terminal."""
    verdict = "identical" if row.identical else f"differs after {row.agreeing}"
    return (
        f"prompt of {row.prompt_tokens}: {row.new_tokens} tokens {verdict}, logprobs within "
        f"{row.logprob_difference:.1e}, smallest margin {row.smallest_margin:.1e}"
    )


def document(outcome: dict[str, list[Comparison]], references: dict[str, Any]) -> None:
    """Replace what stands between the markers of docs/models.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{DOCUMENT} lacks the lines {BEGIN} and {END}")
    versions = next(iter(references.values()))["versions"]
    lines = [
        f"Against transformers {versions['transformers']}, torch {versions['torch']}: float32, eager attention, CPU.",
        "A cell: greedy tokens that agree, of those generated; largest difference of their logprobs.",
        "",
        "| prompt tokens | " + " | ".join(outcome) + " |",
        "|" + "---|" * (len(outcome) + 1),
    ]
    for rows in zip(*outcome.values(), strict=True):
        cells = [f"{row.agreeing} of {row.new_tokens}; {row.logprob_difference:.0e}" for row in rows]
        lines.append(f"| {rows[0].prompt_tokens} | " + " | ".join(cells) + " |")
    margin = min(row.smallest_margin for rows in outcome.values() for row in rows)
    lines += ["", f"The smallest lead of a first logit over the second in all of these steps was {margin:.1e}."]
    DOCUMENT.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
