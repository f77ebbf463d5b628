"""A plan in the making.

Owns: what is decided of a step so far, and the tokens it can still give out. Must never: import jax, or decide
anything.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from hkv_jax.engine.plan import BlockCopy, Chunk, DecodeRows, LaneTables, StepPlan
from hkv_jax.engine.request import Sequence
from hkv_jax.kvcache.manager import Fork


@dataclasses.dataclass(slots=True)
class Draft:
    """The fields of a ``StepPlan``, as they come.

    ``budget`` is in tokens. ``decode_lanes`` i32 are those of decode rows, ascending. ``short``: somebody lacked
    blocks, so nobody new is admitted. ``gathers``: somebody waits for the next plan to move blocks together.
    """

    budget: int
    decode_lanes: NDArray[np.int32] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    admitted: list[Sequence] = dataclasses.field(default_factory=list)
    forks: list[Fork] = dataclasses.field(default_factory=list)
    copies: list[BlockCopy] = dataclasses.field(default_factory=list)
    table_rows: list[LaneTables] = dataclasses.field(default_factory=list)
    short: bool = False
    gathers: bool = False

    def add_decodes(self, lanes: NDArray[np.int32]) -> None:
        """One token of each of ``lanes``."""
        self.decode_lanes = lanes
        self.budget -= len(lanes)

    def add_chunk(self, sequence: Sequence, start: int, end: int) -> None:
        """Tokens ``[start, end)`` of ``sequence``, at most the budget."""
        self.chunks.append(Chunk(sequence, start, end, samples=end == sequence.num_tokens))
        self.budget -= end - start

    def withdraw(self, lane: int) -> None:
        """The lane's sequence was preempted: the device need not set it up. It has no chunk yet."""
        self.forks = [fork for fork in self.forks if fork.target != lane]
        self.table_rows = [rows for rows in self.table_rows if rows.lane != lane]

    def plan(self, decode: DecodeRows) -> StepPlan:
        """The plan; chunks of one token come first, as the device wants its rows."""
        return StepPlan(
            decode,
            chunks=tuple(sorted(self.chunks, key=lambda chunk: chunk.num_tokens > 1)),
            admitted=tuple(self.admitted),
            forks=tuple(self.forks),
            copies=tuple(self.copies),
            table_rows=tuple(self.table_rows),
        )
