"""Ask questions about a long document on a real model, with its sliding tail cached, evicted and never there.

    python tools/check_prefix_reuse.py [--model FOLDER] [--document-tokens N] [--new-tokens N]

In float32 on the CPU. A document is read; its tails are evicted; a question about it is answered by a rebuild, another
by what that left, and both again by an engine that has forgotten everything. A prompt of whole blocks is asked twice.
The model's folder comes from tools/make_real_models.py. Exit status 1 when a token differs from the cold run's.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.make_real_models import is_made  # noqa: E402
from tools.real_prompts import english  # noqa: E402
from tools.throwaway_env import say  # noqa: E402

if TYPE_CHECKING:
    from hkv_jax.engine.engine import Engine

QUESTIONS = (" In one word, where did Ada walk on that morning?", " How many crates had been counted?")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one request got, how its prefix was used, and in which time."""

    name: str
    prompt_tokens: int
    hit: str
    start: int
    rebuilt_tokens: int
    seconds: float
    tokens: tuple[int, ...]


class Reader:
    """One engine, asked one request after the other."""

    def __init__(self, engine: Engine, new_tokens: int) -> None:
        self.engine, self.new_tokens = engine, new_tokens
        self.answers: list[Answer] = []

    def ask(self, name: str, prompt: list[int]) -> Answer:
        """Greedy tokens for a prompt."""
        from hkv_jax import SamplingParams
        from hkv_jax.engine.request import Request

        params = SamplingParams(max_tokens=self.new_tokens, temperature=0.0, ignore_eos=True)
        self.engine.add(Request.create(name, prompt, params))
        started, events = time.perf_counter(), []
        while self.engine.has_work:
            events += self.engine.step()
        use = events[0].sequence.first_prefix
        assert use is not None
        seconds, tokens = time.perf_counter() - started, tuple(event.token_id for event in events)
        answer = Answer(name, len(prompt), use.hit.value, use.start, use.rebuilt_tokens, seconds, tokens)
        self.answers.append(answer)
        say(describe(answer))
        return answer


def main() -> int:
    """Parse the command line, ask, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "models" / "gemma-3-270m"
    parser.add_argument("--model", type=Path, default=default, help="model folder (default: models/gemma-3-270m)")
    parser.add_argument("--document-tokens", type=int, default=9216, help="length of the document (default 9216)")
    parser.add_argument("--whole-tokens", type=int, default=4096, help="of the prompt asked twice (default 4096)")
    parser.add_argument("--new-tokens", type=int, default=48, help="greedy tokens an answer (default 48)")
    parser.add_argument("--kv-cache-memory", default="1GiB", help="of the engine (default 1GiB)")
    options = parser.parse_args()
    if not is_made(options.model):
        parser.error(f"{options.model} is no model folder; tools/make_real_models.py makes one")
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    document = tokenizer.encode(english(options.document_tokens, 0)).ids[: options.document_tokens]
    questions = [tokenizer.encode(text, add_special_tokens=False).ids for text in QUESTIONS]
    longest = max(len(document), options.whole_tokens) + max(map(len, questions)) + options.new_tokens
    reader = Reader(open_engine(options.model, longest, options.kv_cache_memory), options.new_tokens)
    same = check_document(reader, document, questions)
    whole = tokenizer.encode(english(options.whole_tokens, 1)).ids[: options.whole_tokens]
    same &= check_repeat(reader, whole)
    say("\n".join(table(reader.answers)))
    say("every token is that of a cold run" if same else "tokens differ from those of a cold run")
    return 0 if same else 1


def open_engine(model: Path, max_model_len: int, kv_cache_memory: str) -> Engine:
    """An engine for one request at a time; the memory beyond its needs is for what it remembers."""
    # Exact numbers on any machine; jax is told before it is imported.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from hkv_jax.config import EngineConfig
    from hkv_jax.engine.factory import build_engine

    memory: Any = kv_cache_memory  # read as on the command line
    config = EngineConfig(
        model=model, dtype="float32", max_model_len=max_model_len, max_num_seqs=1, kv_cache_memory=memory
    )
    return build_engine(config, lambda what, done, total: say(f"{what} ({done} of {total})")).engine


def check_document(reader: Reader, document: list[int], questions: list[list[int]]) -> bool:
    """Whether questions to a document get the same answers however much of it is found."""
    from hkv_jax.testing.tail_eviction import evict_tails

    reader.ask("the document, cold", [*document, questions[1][0]])
    evict_tails(reader.engine.cache)
    rebuilt = reader.ask("a question, the tail evicted", [*document, *questions[0]])
    resident = reader.ask("another question", [*document, *questions[1]])
    cold = []
    for number, question in enumerate(questions, 1):
        reader.engine.cache.reset()
        cold.append(reader.ask(f"question {number}, cold", [*document, *question]))
    return [rebuilt.tokens, resident.tokens] == [answer.tokens for answer in cold]


def check_repeat(reader: Reader, prompt: list[int]) -> bool:
    """Whether a prompt of whole blocks, repeated, gets the same answer."""
    reader.engine.cache.reset()
    first = reader.ask("a prompt of whole blocks, cold", prompt)
    return reader.ask("the same prompt again", prompt).tokens == first.tokens


def describe(answer: Answer) -> str:
    """One line for the terminal."""
    return (
        f"{answer.name}: {answer.prompt_tokens} tokens, {answer.hit}, computed from {answer.start} on, "
        f"{answer.rebuilt_tokens} of them again, {answer.seconds:.0f} s"
    )


def table(answers: list[Answer]) -> list[str]:
    """For docs/models.md."""
    lines = ["| request | prompt tokens | hit | start | rebuilt tokens | seconds |", "|---|---|---|---|---|---|"]
    return lines + [
        f"| {a.name} | {a.prompt_tokens} | {a.hit} | {a.start} | {a.rebuilt_tokens} | {a.seconds:.1f} |"
        for a in answers
    ]


if __name__ == "__main__":
    raise SystemExit(main())
