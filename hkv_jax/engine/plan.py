"""What the scheduler decides for one step, as plain host data.

Owns: the types that cross from the scheduler to ``engine.batch``. Must never: import jax, or hold block ids (those are
read from the ``CacheManager`` when the batch is built, after the last block has moved).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from hkv_jax.engine.request import Sequence
    from hkv_jax.kvcache.manager import Fork


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``[start, end)`` of one sequence, run in this step; their ids are known to the host.

    ``samples`` is true when ``end`` is the last known token, so that the step also draws the next one.
    """

    sequence: Sequence
    start: int
    end: int
    samples: bool

    @property
    def num_tokens(self) -> int:
        """Length of the chunk in tokens, at least 1."""
        return self.end - self.start

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the step is to compute logprobs of prompt tokens that follow tokens of this chunk."""
        return self.sequence.wants_prompt_logprobs and self.start + 1 < self.sequence.request.prompt_len


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeRows:
    """Sequences that run exactly one token, the one their lane drew last (it may not have been read yet).

    Row i is ``sequences[i]`` in ``lanes[i]``, at absolute position ``positions[i]``; all i32[num rows].
    """

    sequences: tuple[Sequence, ...]
    lanes: NDArray[np.int32]
    positions: NDArray[np.int32]


@dataclasses.dataclass(frozen=True, slots=True)
class LaneTables:
    """The device's whole table rows of a lane, one i32[table width] a group, as they are before the plan's step.

    They hold the blocks of the cached prefix alone: what the chunk itself takes comes with the step's table updates,
    which a sliding group's ring applies only once the older blocks are read.
    """

    lane: int
    rows: tuple[NDArray[np.int32], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class BlockCopy:
    """A block of ``group`` that moved or was duplicated; pages are those of layer 0. Targets were free."""

    group: int
    source_page: int
    target_page: int


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: decode rows first, then chunks (those of one token first).

    ``admitted`` are sequences that took a fresh lane in this plan: the runner sets up their lane before the step.
    ``forks`` run before the step as well: a lane takes over another's state, partial blocks are copied; the sequence
    of the new lane is not among the admitted.

    What changes before the step, in this order: ``copies``, one after the other; then ``table_rows`` of sequences whose
    cached or moved blocks the device's tables do not name; then lanes are set up, then forks.
    """

    decode: DecodeRows
    chunks: tuple[Chunk, ...]
    admitted: tuple[Sequence, ...] = ()
    forks: tuple[Fork, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    table_rows: tuple[LaneTables, ...] = ()

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The sequence of every live row, in row order."""
        return (*self.decode.sequences, *(chunk.sequence for chunk in self.chunks))

    @property
    def num_rows(self) -> int:
        """Live rows of the step."""
        return len(self.decode.sequences) + len(self.chunks)

    @property
    def num_tokens(self) -> int:
        """Query tokens of the step."""
        return len(self.decode.sequences) + sum(chunk.num_tokens for chunk in self.chunks)
