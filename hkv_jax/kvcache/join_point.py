"""A place where a later request can join a cached prefix.

Owns: what a join point is, and what evicting one would do. Must never: decide which goes.
"""

from __future__ import annotations

import dataclasses
import enum

from hkv_jax.kvcache.prefix_tree import Node


class JoinKind(enum.Enum):
    """Why a join point exists.

    PROMPT_END: the last full block of a prompt that leaves a token to compute. BEFORE_END: blocks just before it, since
    a question may cross into the document's last block. BRANCH: prompts were seen to differ from here on. TURN: the end
    of what a finished or preempted sequence computed. RUNNING: the last full block of a running one. REST: global
    blocks without a tail, from which a rebuild still saves work.
    """

    PROMPT_END = "prompt_end"
    BEFORE_END = "before_end"
    BRANCH = "branch"
    TURN = "turn"
    RUNNING = "running"
    REST = "rest"


HALF_LIFE_SECONDS = 10.0
"""Interest in a join point left alone for so long is half as great. Learning it from the times between uses was no
better on any trace (docs/benchmarks.md)."""


@dataclasses.dataclass(slots=True)
class Interest:
    """What speaks for further uses, as of the time ``since`` in seconds; all of it fades with the same half-life.

    ``fresh`` is 1 when the join point was made or used, ``heat`` counts uses, ``inherited`` are uses expected of
    evicted join points above: whoever would have joined there will join here.
    """

    since: float
    fresh: float = 1.0
    heat: float = 0.0
    inherited: float = 0.0

    def at(self, now: float) -> Interest:
        """What is left of it at ``now``, not before ``since``."""
        left = 0.5 ** ((now - self.since) / HALF_LIFE_SECONDS)
        return Interest(now, self.fresh * left, self.heat * left, self.inherited * left)

    def expected(self, chance: float) -> float:
        """Uses expected of a join point that is used again at all with ``chance``."""
        return self.fresh * chance * max(1.0, self.heat) + self.inherited


class JoinPoint:
    """A tail before ``node.end``: ``blocks`` of each sliding group (none in a REST).

    Attributes:
        kind: why it exists; ``origin`` is what a REST was before.
        interest: what speaks for further uses.
        num_hits: requests that started here; ``num_waiting`` wait to.
        lower_end: where the next lower join point with a tail lay when this one was made: a REST's worth need not
            follow every change below it.
        version: counts what happened to it, so that its older places in the order of eviction are known to be void.
    """

    __slots__ = (
        "alive", "blocks", "interest", "kind", "lower_end", "node", "num_hits", "num_waiting", "origin", "version"
    )  # fmt: skip

    def __init__(self, node: Node, kind: JoinKind, blocks: list[list[int]], now: float) -> None:
        self.node = node
        self.kind = kind
        self.origin: JoinKind = JoinKind.TURN if kind is JoinKind.REST else kind
        self.blocks = blocks
        self.interest = Interest(now)
        self.num_hits = 0
        self.num_waiting = 0
        self.lower_end = 0
        self.version = 0
        self.alive = True


@dataclasses.dataclass(frozen=True, slots=True)
class Stake:
    """What evicting a join point would do: ``num_tokens`` of work lost if it is used again, ``num_bytes`` freed.

    A block that several join points keep counts for each of them in part: none alone would free it, all together do.
    """

    num_tokens: float
    num_bytes: float
