"""The model folder read by Hugging Face transformers: the same greedy tokens, or not.

Owns: the comparison of three readers, transformers, the dense forward pass and the paged engine. Must never: import
torch; that runs in an environment of its own.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hkv_jax import LLM, SamplingParams
from tools.demo_training import evaluation, model
from tools.demo_training.evaluation import Foresee
from tools.demo_training.paged import num_right
from tools.demo_training.question_set import recall_questions
from tools.demo_training.questions import END_OF_ANSWER
from tools.throwaway_env import reference_python, run_in

NEW_TOKENS = 32
DENSE_LENGTH = 4352
"""One length for all, so that the dense forward pass is compiled once: room for the longest prompt and its answer."""
LENGTHS = (512, 1024, 4096)
REFERENCE = Path(__file__).resolve().parents[1] / "real_reference.py"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Answers that are the same in all three, right ones among them, and the versions they come from."""

    num_questions: int
    same: int
    right: int
    smallest_margin: float
    versions: dict[str, str]

    @property
    def identical(self) -> bool:
        """Whether no token differs."""
        return self.same == self.num_questions

    def lines(self) -> list[str]:
        """For the model card."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lengths = ", ".join(f"{length:,}" for length in LENGTHS)
        return [
            f"{self.num_questions} questions in documents of {lengths} tokens, float32 on the CPU ({versions}, eager",
            f"attention): {self.same} of {self.num_questions} answers are token for token the same in transformers, in",
            f"the dense forward pass and in hkv-jax; {self.right} of them are right. The smallest lead of a first",
            f"logit over the second was {self.smallest_margin:.2g}.",
        ]


def compare(folder: Path, venv: Path | None) -> Outcome:
    """Run all three on the same questions."""
    questions = [one for length in LENGTHS for one in recall_questions(length, 12, 1)]
    prompts = [question.prompt for question in questions]
    reference = _transformers(folder, prompts, venv)
    shape, parameters = model.load(folder)
    theirs = [_to_end(result["tokens"]) for result in reference["results"]]
    foreseen = evaluation.foresee(shape, parameters)
    dense = [_is_greedy(foreseen, prompt, answer) for prompt, answer in zip(prompts, theirs, strict=True)]
    paged = _paged(folder, prompts)
    margins = [
        margin
        for result, answer in zip(reference["results"], theirs, strict=True)
        for margin in result["margins"][: len(answer)]
    ]
    return Outcome(
        num_questions=len(questions),
        same=sum(a == b and c for a, b, c in zip(theirs, paged, dense, strict=True)),
        right=num_right(theirs, questions),
        smallest_margin=min(margins),
        versions=reference["versions"],
    )


def _transformers(folder: Path, prompts: Sequence[list[int]], venv: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hkv-jax-reference-") as place, reference_python((), folder=venv) as python:
        asked, result = Path(place) / "prompts.json", Path(place) / "result.json"
        asked.write_text(json.dumps({"new_tokens": NEW_TOKENS, "prompts": prompts}), encoding="utf-8")
        run_in(python, [REFERENCE, folder, asked, result])
        answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return answer


def _paged(folder: Path, prompts: Sequence[list[int]]) -> list[list[int]]:
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, detokenize=False)
    longest = max(map(len, prompts)) + NEW_TOKENS
    with LLM(folder, dtype="float32", max_model_len=longest, max_num_seqs=4, max_num_batched_tokens=256) as llm:
        outputs = llm.generate(list(prompts), params)
    return [_to_end(list(output.outputs[0].token_ids)) for output in outputs]


def _is_greedy(foreseen: Foresee, prompt: list[int], answer: list[int]) -> bool:
    """Whether the dense model draws just this answer: each of its tokens is the likeliest after those before it."""
    tokens = np.zeros(DENSE_LENGTH, np.int32)
    end = len(prompt) + len(answer)
    tokens[:end] = prompt + answer
    return bool(foreseen(tokens)[len(prompt) : end].all())


def _to_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END_OF_ANSWER) + 1] if END_OF_ANSWER in tokens else tokens
