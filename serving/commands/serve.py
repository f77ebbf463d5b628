"""`hkv-jax serve`: the gRPC server as a process.

Owns: signals, and the order of start and end. Must never: know the protocol.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import importlib.util
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hkv_jax.config import EngineConfig
from hkv_jax.errors import ConfigError
from serving.activity import activity
from serving.commands.option_flags import add_engine_flags, add_server_flags, given_engine_options, server_config
from serving.commands.terminal import Commands, ProgressLine, say, show_layout

if TYPE_CHECKING:
    from hkv_jax.engine.loop import EngineLoop
    from hkv_jax.engine.open_model import OpenModel
    from serving.server_options import ServerOptions

logger = logging.getLogger(__name__)

EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}
EXIT_ENGINE_STOPPED = 1
_WATCH_SECONDS = 1.0
_ACTIVITY_SECONDS = 10.0

_EPILOG = """\
examples:
  hkv-jax serve                                           the bundled demo model on 127.0.0.1:50051
  hkv-jax serve --model models/gemma-3-270m --host 0.0.0.0 --port 8000
  hkv-jax serve --config configs/gemma-3-270m-cpu.toml --max-num-seqs 4

The service is hkv.v1.Inference (serving/proto/hkv_inference.proto), with grpc.health.v1 and reflection:
  grpcurl -plaintext -d '{"text": "Once", "sampling": {"max_tokens": 8}}' \\
      127.0.0.1:50051 hkv.v1.Inference/GenerateStream

Health is SERVING once every program is compiled. While requests run, a line every ten seconds says how many, how fast,
how full the pools are and how much of the prompts was cached; GetServerInfo has the counts.

SIGTERM or Ctrl-C: no new requests, those that live may end within --drain-seconds; a second signal cuts them off.
"""


def add_parser(commands: Commands) -> None:
    """Adds the command and its flags."""
    parser = commands.add("serve", "serve a model over gRPC", _EPILOG)
    add_server_flags(parser)
    add_engine_flags(parser)
    parser.set_defaults(run=run, quiet=False)


def run(args: argparse.Namespace) -> int:
    """Serves until a signal; returns the exit code."""
    config = EngineConfig.from_options(given_engine_options(args))
    options = server_config(args)
    if importlib.util.find_spec("grpc") is None:
        raise ConfigError("serve needs gRPC, which is not installed: pip install 'hkv-jax[serving]'")
    with asyncio.Runner(loop_factory=_event_loop_factory()) as runner:
        return runner.run(_serve(config, options))


class _Signals:
    """SIGTERM and SIGINT: the first asks the server to end, a second one to end at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()
        self._first: signal.Signals | None = None
        for number in EXIT_CODES:
            asyncio.get_running_loop().add_signal_handler(number, self._take, number)

    @property
    def exit_code(self) -> int:
        """By the first signal; without one the engine has stopped by itself."""
        return EXIT_ENGINE_STOPPED if self._first is None else EXIT_CODES[self._first]

    def _take(self, number: signal.Signals) -> None:
        if self._first is None:
            self._first = number
            self.asked.set()
        else:
            self.hurried.set()


async def _serve(config: EngineConfig, options: ServerOptions) -> int:
    from serving.server import InferenceServer

    signals = _Signals()
    server = InferenceServer(options)
    name = config.model.resolve().name
    address = await server.start()
    try:
        say(f"listening on {address}, getting {name} ready")
        opening = _open(config)
        if not await _before(signals.asked, opening):
            say("stopped before it was ready")
            await server.stop()
            # The thread that compiles cannot be asked to stop, and there is nothing to save.
            os._exit(signals.exit_code)
        model = opening.result()
        show_layout(model.layout)
        await server.serve(name, model.loop)
        say(f"serving on {address}")
        await _watch(model.loop, signals)
    finally:
        stopping = asyncio.ensure_future(server.stop())
        if not await _before(signals.hurried, stopping):
            await server.cut_off()
        await stopping
    await asyncio.to_thread(model.loop.close)
    say("stopped")
    return signals.exit_code


def _open(config: EngineConfig) -> asyncio.Future[OpenModel]:
    """Opens the model on a thread of its own, which does not keep the process alive."""
    future: concurrent.futures.Future[OpenModel] = concurrent.futures.Future()

    def work() -> None:
        from hkv_jax.engine.open_model import open_model

        progress = ProgressLine()
        try:
            model = open_model(config, progress=progress)
        except BaseException as error:  # whoever awaits the future gets it
            progress.end()
            future.set_exception(error)
        else:
            progress.end()
            future.set_result(model)

    threading.Thread(target=work, name="hkv-open", daemon=True).start()
    return asyncio.wrap_future(future)


async def _before(event: asyncio.Event, future: asyncio.Future[Any]) -> bool:
    """Waits for whichever comes first; returns whether ``future`` is done."""
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((waiting, future), return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    return future.done()


async def _watch(engine: EngineLoop, signals: _Signals) -> None:
    """Waits for the first signal, or for an engine that has stopped by itself: whoever started the server must know.

    Meanwhile it logs what the server does, as long as it does something.
    """
    before, since = engine.stats(), time.monotonic()
    while not signals.asked.is_set():
        if not engine.running:
            say("the engine has stopped; the log says why")
            return
        if (seconds := time.monotonic() - since) >= _ACTIVITY_SECONDS:
            now = engine.stats()
            if (line := activity(before, now, seconds)) is not None:
                logger.info(line)
            before, since = now, since + seconds
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(signals.asked.wait(), _WATCH_SECONDS)


def _event_loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """That of uvloop where it is installed: half the time a message."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
