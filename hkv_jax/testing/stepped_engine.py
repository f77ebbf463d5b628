"""A fake engine that steps when a test lets it, so that what happens between two steps can be decided."""

from __future__ import annotations

import threading

from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.testing.fake_engine import FakeEngineConfig, fake_engine

PATIENCE_SECONDS = 10
"""How long a step may take to happen before something must be wrong."""


class SteppedEngine:
    """What ``Engine`` is to ``EngineLoop``.

    ``error``, when set, is raised by the next step instead.
    """

    def __init__(self, config: FakeEngineConfig | None = None) -> None:
        """An idle engine that will not step before ``run`` or ``run_freely``."""
        self._engine = fake_engine(config)
        self.scheduler = self._engine.scheduler
        self.cache = self._engine.cache
        self.add, self.abort, self.finish = self._engine.add, self._engine.abort, self._engine.finish
        self._steps = threading.Semaphore(0)
        self._stepped = threading.Semaphore(0)
        self._free = False
        self.error: Exception | None = None

    @property
    def has_work(self) -> bool:
        """As ``Engine``."""
        return self._engine.has_work

    @property
    def used_blocks(self) -> int:
        """Blocks held, in all pools."""
        return sum(pool.used_blocks for pool in self.cache.stats())

    def step(self) -> list[TokenEvent]:
        """As ``Engine``, once it is let."""
        if not self._free:
            self._steps.acquire()
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        events = self._engine.step()
        self._stepped.release()
        return events

    def run(self, num_steps: int) -> None:
        """Lets it step that often, and waits until it has; an error counts as no step."""
        for _ in range(num_steps):
            self._steps.release()
            assert self._stepped.acquire(timeout=PATIENCE_SECONDS)

    def run_freely(self) -> None:
        """Lets it step as often as it likes."""
        self._free = True
        self._steps.release()

    def fail(self, error: Exception) -> None:
        """Lets it step once and fail."""
        self.error = error
        self._steps.release()
