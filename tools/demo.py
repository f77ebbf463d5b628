"""`make demo`: the server as users start it, clients asking about long documents, and what the hybrid cache did.

Owns nothing: what it shows is the `hkv-jax` command on its bundled model, the project's client, and what the server
tells. The documents are full of facts about people; each question asks for one of them, and the model was trained to
find it. A cache that loses or mixes up a block gives a wrong value, and then the exit status is not 0. Nothing is left
in the working tree.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hkv_jax import SamplingParams  # noqa: E402
from hkv_jax.config import DEMO_MODEL  # noqa: E402
from hkv_jax.errors import HkvError  # noqa: E402
from hkv_jax.outputs import Usage  # noqa: E402
from hkv_jax.tokenizer import Tokenizer  # noqa: E402
from serving.client import AsyncInferenceClient  # noqa: E402
from serving.info import ServerInfo  # noqa: E402
from serving.server_process import ServerProcess  # noqa: E402
from tools.demo_training.story import Story, tell  # noqa: E402

GREEDY = SamplingParams(temperature=0, max_tokens=32)
NUM_DOCUMENTS, DOCUMENT_TOKENS, FACTS_A_DOCUMENT = 2, 3000, 24
QUESTIONS_A_DOCUMENT = 5
# Few and small programs: they are compiled at the first start and kept in the user's cache folder.
FLAGS = (
    *("--model", "demo", "--max-model-len", "4096", "--max-num-seqs", "4"),
    *("--max-num-batched-tokens", "128", "--kv-cache-memory", "16MiB"),
)
START_SECONDS = 300.0
STOP_SECONDS = 60.0


class Server(Protocol):
    """What the demo needs of a server: ``ServerProcess`` is one."""

    def address(self, timeout: float) -> str:
        """Where it listens."""
        ...

    def stop(self, timeout: float) -> int:
        """Ends it; its exit code."""
        ...


class DemoError(Exception):
    """Something did not go as it must; the message is for the user."""


@dataclasses.dataclass
class Question:
    """One client's question about a document, and what became of it."""

    document: int
    story: Story
    text: str
    expected: str
    answer: str = ""
    usage: Usage | None = None

    @property
    def right(self) -> bool:
        """Whether the whole answer came, and nothing else."""
        return self.usage is not None and self.answer.strip() == self.expected

    def row(self) -> tuple[str, str, Text, str]:
        """For the table: document, question, answer, and how much of the prompt was cached."""
        if self.usage is None:
            return f"{self.document}", self.text, Text(self.answer), ""
        verdict = Text(self.answer.strip(), "green" if self.right else "bold red")
        if not self.right:
            verdict.append(f"  (should be: {self.expected})")
        return f"{self.document}", self.text, verdict, f"{self.usage.cached_tokens:,} of {self.usage.prompt_tokens:,}"


class Answers:
    """All questions and their answers, as they grow."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions = questions

    def __rich__(self) -> Group:
        table = Table(title="Several clients ask at once", title_justify="left")
        table.add_column("document", justify="right")
        table.add_column("question", min_width=20)
        table.add_column("answer", min_width=20)
        table.add_column("tokens from the prefix cache", justify="right", min_width=14)
        for question in self._questions:
            table.add_row(*question.row())
        return Group(table)


def make_questions() -> list[Question]:
    """Some questions about each of a few documents, about facts from its beginning to its end."""
    questions = []
    for document in range(1, NUM_DOCUMENTS + 1):
        story = tell(document, DOCUMENT_TOKENS, FACTS_A_DOCUMENT)
        step = len(story.exchanges) // QUESTIONS_A_DOCUMENT
        for exchange in story.exchanges[::step][:QUESTIONS_A_DOCUMENT]:
            expected = f"{exchange.lead}{exchange.answer}."
            questions.append(Question(document, story, exchange.question, expected))
    return questions


async def ask(address: str, tokenizer: Tokenizer, question: Question) -> None:
    """A client that streams one answer; the document and the question are one message of a chat."""
    message = {"role": "user", "content": f"{question.story.text} {question.text}"}
    async with AsyncInferenceClient(address) as client:
        async for delta in client.generate_stream(tokenizer.encode_chat([message]), GREEDY):
            question.answer += delta.completion.text
            question.usage = delta.usage or question.usage


async def ask_all(address: str, console: Console) -> tuple[list[Question], ServerInfo]:
    """The first question about each document, then all others at once; and what the server says about its cache."""
    questions, tokenizer = make_questions(), Tokenizer.from_folder(DEMO_MODEL)
    async with AsyncInferenceClient(address) as client:
        await client.wait_ready(timeout=START_SECONDS)
        first = [
            next(one for one in questions if one.document == document) for document in {q.document for q in questions}
        ]
        rest = [one for one in questions if one not in first]
        with Live(Answers(questions), console=console, refresh_per_second=4):
            for batch in (first, rest):
                async with asyncio.TaskGroup() as tasks:
                    for question in batch:
                        tasks.create_task(ask(address, tokenizer, question))
        return questions, await client.server_info()


def check(questions: Sequence[Question], info: ServerInfo) -> None:
    """The answers must be right, and the figures those of a cache that works.

    Raises:
        DemoError: one is not.
    """
    wrong = [one for one in questions if not one.right]
    if wrong:
        first = wrong[0]
        raise DemoError(
            f"{len(wrong)} of {len(questions)} answers are wrong; to {first.text!r} came {first.answer.strip()!r}, "
            f"which should be {first.expected!r}"
        )
    for pool in info.pools:
        if not pool.peak_used_blocks:
            raise DemoError(f"the {pool.name} pool was never used")
        if pool.name.startswith("sliding") and not pool.released_early_blocks:
            raise DemoError(f"the {pool.name} pool released no block early")


def cache_table(info: ServerInfo) -> Table:
    """What each pool held and gave back, and what a cache without windows would have held."""
    table = Table(title="What the hybrid KV cache did", title_justify="left")
    table.add_column("pool", no_wrap=True)
    for heading in ("tokens a block", "blocks", "peak", "released early", "bytes at peak"):
        table.add_column(heading, justify="right")
    for pool in info.pools:
        counts = (pool.block_size, pool.num_blocks, pool.peak_used_blocks, pool.released_early_blocks, pool.peak_bytes)
        table.add_row(pool.name, *(f"{count:,}" for count in counts))
    table.add_section()
    held = sum(pool.peak_bytes for pool in info.pools)
    table.add_row("all pools", "", "", "", "", f"{held:,}")
    if info.all_global_peak_bytes is not None:
        table.add_row("all-global cache", "", "", "", "", f"{info.all_global_peak_bytes:,}")
        saved = 1 - held / info.all_global_peak_bytes
        table.caption = f"{saved:.0%} less than a cache that keeps every token of every layer"
    return table


def prefix_line(info: ServerInfo) -> str:
    """What the prefix cache saved, with the hits by kind."""
    prefix = info.prefix
    hits = ", ".join(f"{count} {hit}" for hit, count in prefix.hits.items() if count)
    return (
        f"Prefix cache: {prefix.prefix_hit_tokens:,} of {prefix.prompt_tokens:,} prompt tokens were not computed; "
        f"requests by kind of hit: {hits}"
    )


def show(address: str, console: Console) -> None:
    """Asks, checks and shows everything against a server at ``address``.

    Raises:
        DemoError: an answer is wrong, or a figure.
    """
    questions, info = asyncio.run(ask_all(address, console))
    console.print()
    console.print(cache_table(info))
    console.print(prefix_line(info))
    check(questions, info)
    console.print(f"All {len(questions)} answers are right.")


def run(server: Server, console: Console) -> int:
    """The demo against a server that was started: 0 when it ends well and every answer was right."""
    try:
        show(server.address(START_SECONDS), console)
        code = server.stop(STOP_SECONDS)
        if code != 0:
            raise DemoError(f"the server ended with exit code {code}")
    except (DemoError, HkvError, TimeoutError) as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> int:
    """Starts the server and runs the demo against it."""
    with ServerProcess(FLAGS, echo=lambda line: print(line, end="", file=sys.stderr, flush=True)) as server:
        return run(server, Console())


if __name__ == "__main__":
    sys.exit(main())
