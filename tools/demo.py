"""`make demo`: the server as users start it, a handful of clients at once, and what the hybrid cache did meanwhile.

Owns nothing: what it shows is the `hkv-jax` command, the project's client, and what the server tells. It leaves nothing
in the working tree: the bundled demo model is served, or, while there is none, a small random one from a temporary
folder.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hkv_jax import SamplingParams
from hkv_jax.config import DEMO_MODEL
from hkv_jax.errors import HkvError
from serving.client import AsyncInferenceClient
from serving.info import ServerInfo
from serving.server_process import ServerProcess

PROMPTS = (
    "Once upon a time there was a river that",
    "The old lighthouse keeper opened the door and",
    "Winter came early to the village, so",
    "A small boat left the harbor at dawn;",
    "In the garden behind the house",
    "The map showed an island where",
)
# Long enough that every window slides several times; stops are masked until it has.
PARAMS = SamplingParams(min_tokens=180, max_tokens=200)
# Few and small programs: they are compiled at the first start and kept in the user's cache folder.
FLAGS = (
    *("--max-model-len", "512", "--max-num-seqs", "4"),
    *("--max-num-batched-tokens", "32", "--kv-cache-memory", "8MiB"),
)
START_SECONDS = 300.0
STOP_SECONDS = 60.0
SHOWN_CHARACTERS = 320


class DemoError(Exception):
    """Something did not go as it must; the message is for the user."""


class Answers:
    """The streams side by side, as they grow."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._prompts = prompts
        self._texts = [""] * len(prompts)
        self.num_tokens = [0] * len(prompts)

    def add(self, index: int, text: str, num_tokens: int) -> None:
        self._texts[index] += text
        self.num_tokens[index] += num_tokens

    def __rich__(self) -> Group:
        panels = []
        for prompt, text, num_tokens in zip(self._prompts, self._texts, self.num_tokens, strict=True):
            tail = text if len(text) <= SHOWN_CHARACTERS else "… " + text[-SHOWN_CHARACTERS:].partition(" ")[2]
            panels.append(Panel(Text.assemble((prompt, "bold"), tail), subtitle=f"{num_tokens} tokens", height=9))
        return Group(Columns(panels, width=58, equal=True))


async def ask_all(address: str, console: Console) -> ServerInfo:
    """All prompts at once, one client; then what the server says about its cache."""
    answers = Answers(PROMPTS)

    async def ask(client: AsyncInferenceClient, index: int) -> None:
        async for delta in client.generate_stream(PROMPTS[index], PARAMS.replace(seed=index)):
            answers.add(index, delta.completion.text, len(delta.completion.token_ids))
            live.update(answers)

    async with AsyncInferenceClient(address) as client:
        await client.wait_ready(timeout=START_SECONDS)
        with Live(answers, console=console, refresh_per_second=4) as live:
            async with asyncio.TaskGroup() as tasks:
                for index in range(len(PROMPTS)):
                    tasks.create_task(ask(client, index))
        if min(answers.num_tokens) < (PARAMS.min_tokens or 0):
            raise DemoError(f"answers of {answers.num_tokens} tokens; each should have {PARAMS.min_tokens} or more")
        return await client.server_info()


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


def check(info: ServerInfo) -> None:
    """The figures must be those of a cache that works."""
    for pool in info.pools:
        if not pool.peak_used_blocks:
            raise DemoError(f"the {pool.name} pool was never used")
        if pool.name.startswith("sliding") and not pool.released_early_blocks:
            raise DemoError(f"the {pool.name} pool released no block early")


def make_model(folder: Path) -> Path:
    """The bundled model, or a random one in ``folder``."""
    if (DEMO_MODEL / "config.json").is_file():
        return DEMO_MODEL
    model = folder / "random-demo"
    print("no demo model is bundled yet: making a small random one, which knows words and no sense", file=sys.stderr)
    maker = Path(__file__).resolve().with_name("make_demo_checkpoint.py")
    subprocess.run([sys.executable, str(maker), str(model)], check=True)
    return model


def main() -> int:
    console = Console()
    with tempfile.TemporaryDirectory(prefix="hkv-jax-demo-") as folder:
        flags = ("--model", str(make_model(Path(folder))), *FLAGS)
        with ServerProcess(flags, echo=lambda line: print(line, end="", file=sys.stderr, flush=True)) as server:
            try:
                info = asyncio.run(ask_all(server.address(START_SECONDS), console))
                code = server.stop(STOP_SECONDS)
                if code != 0:
                    raise DemoError(f"the server ended with exit code {code}")
                check(info)
            except (DemoError, HkvError, TimeoutError) as error:
                print(f"demo failed: {error}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                return 130
    console.print()
    console.print(cache_table(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
