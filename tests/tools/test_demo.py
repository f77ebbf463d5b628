"""`make demo` ends with 0 when every answer is right, and not with 0 when one entry of a block table is wrong."""

from __future__ import annotations

import asyncio
import io
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Self

import pytest
from rich.console import Console

from hkv_jax.config import DEMO_MODEL, EngineConfig
from hkv_jax.engine.factory import EngineParts, build_engine
from hkv_jax.engine.open_model import Progress, open_model
from hkv_jax.kvcache.manager import CacheManager
from hkv_jax.tokenizer import Tokenizer
from serving.server import InferenceServer
from serving.server_options import ServerOptions
from tools import demo
from tools.demo_training.damage import wrong_table_entry

pytestmark = pytest.mark.slow

BLOCK_SIZE = 32
PATIENCE_SECONDS = 120
CONFIG = EngineConfig(
    model=DEMO_MODEL,
    max_model_len=4096,
    max_num_seqs=4,
    max_num_batched_tokens=128,
    kv_cache_memory=16 * 2**20,
    block_size={"all": BLOCK_SIZE},
)


class InProcessServer:
    """The service over an engine whose cache was treated by ``damage`` before its first request."""

    def __init__(self, damage: Callable[[CacheManager], None]) -> None:
        self._damage = damage
        self._address: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(PATIENCE_SECONDS)

    def address(self, timeout: float) -> str:
        return self._address.get(timeout=timeout)

    def stop(self, timeout: float) -> int:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(timeout)
        return 0

    def _factory(self, config: EngineConfig, progress: Progress | None) -> EngineParts:
        parts = build_engine(config, progress)
        self._damage(parts.engine.cache)
        return parts

    async def _serve(self) -> None:
        server = InferenceServer(ServerOptions(port=0, drain_seconds=0))
        address = await server.start()
        model = open_model(CONFIG, engine_factory=self._factory)
        await server.serve("demo", model.loop)
        self._address.put(address)
        await self._stopped.wait()
        await server.stop()
        await asyncio.to_thread(model.loop.close)


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=200, file=io.StringIO())


def column_of_first_fact() -> int:
    """The block in which the value lies that the first question asks for."""
    question, tokenizer = demo.make_questions()[0], Tokenizer.from_folder(DEMO_MODEL)
    value = question.expected.rstrip(".").rpartition(" ")[2]
    before = question.story.text.partition(f" {value}.")[0]
    return len(tokenizer.encode(f"<user>{before}")) // BLOCK_SIZE


def test_right_answers_end_with_zero(console: Console) -> None:
    with InProcessServer(lambda cache: None) as server:
        assert demo.run(server, console) == 0
    said = console.export_text()
    assert "All 10 answers are right." in said
    assert "less than a cache that keeps every token" in said
    assert "Prefix cache:" in said


def test_a_wrong_table_entry_does_not(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    column = column_of_first_fact()
    assert column > 0
    with InProcessServer(partial(wrong_table_entry, column=column)) as server:
        assert demo.run(server, console) == 1
    assert "answers are wrong" in capsys.readouterr().err
