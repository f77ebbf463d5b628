"""`hkv-jax serve` in a process of its own, for programs that want a server of theirs while they run.

Owns: the process, from its start to its exit code. Must never: import jax or grpc.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

from hkv_jax.errors import EngineStoppedError

_LISTENING = "listening on "


class ServerProcess:
    """A server that was started, and is killed when the ``with`` is left unless it has ended before."""

    def __init__(
        self,
        flags: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        echo: Callable[[str], None] | None = None,
    ) -> None:
        """Starts it, on a free port unless the flags name one.

        Args:
            flags: of ``hkv-jax serve``.
            environment: of the process; that of this one when left out.
            echo: gets each line it writes to stderr, on another thread.
        """
        command = [sys.executable, "-m", "serving", "serve", "--port", "0", *flags]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment
        )
        self._echo = echo
        self._lines: list[str] = []
        self._address: SimpleQueue[str] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def said(self) -> str:
        """What it has written to stderr so far."""
        return "".join(self._lines)

    def address(self, timeout: float) -> str:
        """Waits until it listens and returns where; whether it is ready, its health tells.

        Raises:
            EngineStoppedError: it has ended instead, or ``timeout`` seconds have passed.
        """
        with contextlib.suppress(Empty):
            address = self._address.get(timeout=timeout)
            if address:
                self._address.put(address)
                return address
        raise EngineStoppedError(f"the server does not listen; it said: {self.said[-2000:]}")

    def stop(self, timeout: float, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit code.

        Raises:
            TimeoutError: it has not ended after ``timeout`` seconds.
        """
        self._process.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float) -> int:
        """Waits for its end and returns the exit code.

        Raises:
            TimeoutError: it has not ended after ``timeout`` seconds.
        """
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"the server has not ended within {timeout:g} s") from error
        self._reader.join()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._lines.append(line)
                if line.startswith(_LISTENING):
                    self._address.put(line.removeprefix(_LISTENING).partition(",")[0].strip())
                if self._echo is not None:
                    self._echo(line)
        self._address.put("")
