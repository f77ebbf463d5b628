"""Why R tokens are enough, and no fewer, at any depth: layers that compute terms instead of numbers.

A layer's output is the pair of its input and the inputs of all tokens it sees, so that two runs agree only where every
path through every layer does; numbers would hide at depth 20 what rounding swallows. Equal terms get equal numbers.
"""

from __future__ import annotations

import itertools

import pytest

from hkv_jax.kvcache.receptive import receptive_tokens
from hkv_jax.spec import KVGroupSpec, LayerKind

Terms = list[list[int]]
"""By layer, then position: the number of the term that the layer's K/V is made from; the last row is the output."""


class Stack:
    """Layers from the bottom up; a window in tokens, ``None`` for a global one."""

    def __init__(self, windows: list[int | None]) -> None:
        self.windows = windows
        self._numbers: dict[object, int] = {}

    def _term(self, parts: object) -> int:
        return self._numbers.setdefault(parts, len(self._numbers))

    def run(self, num_tokens: int, start: int = 0, cached: Terms | None = None, matched: int = 0) -> Terms:
        """All terms of tokens ``[start, num_tokens)``, -1 for those that are not computed.

        Global layers read what is ``cached`` of tokens below ``matched``; sliding layers have nothing below ``start``.
        """
        values = [self._term(("token", position)) for position in range(num_tokens)]
        rows: Terms = []
        for layer, window in enumerate(self.windows):
            row = [value if position >= start else -1 for position, value in enumerate(values)]
            if window is None and cached is not None:
                row[:matched] = cached[layer][:matched]
            rows.append(row)
            outputs = [-1] * num_tokens
            for position in range(start, num_tokens):
                first = 0 if window is None else max(start, position - window + 1)
                outputs[position] = self._term((layer, values[position], tuple(row[first : position + 1])))
            values = outputs
        rows.append(values)
        return rows

    def receptive(self, size: int) -> int:
        """R for blocks of ``size`` tokens."""
        groups = [
            KVGroupSpec(f"{index}", LayerKind.GLOBAL if window is None else LayerKind.SLIDING, window, 1, 8, (index,))
            for index, window in enumerate(self.windows)
        ]
        tokens = receptive_tokens(groups, [size] * len(groups))
        assert tokens is not None
        return tokens


def kinds(pattern: str, windows: tuple[int, ...]) -> list[int | None]:
    """``s`` slides, with the windows in turn; ``g`` is global."""
    turns = itertools.cycle(windows)
    return [next(turns) if kind == "s" else None for kind in pattern]


CASES = [
    (pattern, windows, size)
    for pattern in ("ssgsg", "sssgsssg", "gsss", 4 * "sssssg")
    for windows, size in (((4,), 4), ((5,), 2), ((5,), 4), ((7, 3), 4))
] + [("ssgsg", (16,), 8), ("ssgsg", (17,), 8), ("sssgsssg", (5, 16), 4)]


@pytest.mark.parametrize(("pattern", "windows", "size"), CASES, ids=str)
def test_the_receptive_length_is_enough_and_the_least(pattern: str, windows: tuple[int, ...], size: int) -> None:
    stack = Stack(kinds(pattern, windows))
    run = stack.receptive(size)
    matched = run + 2 * size - run % size
    end = matched + 3
    cold = stack.run(end)
    assert exact(stack, cold, size, matched, matched - run)
    assert not exact(stack, cold, size, matched, matched - run + 1)
    assert not exact(stack, cold, size, matched, matched - run + max(windows) - 1)


def exact(stack: Stack, cold: Terms, size: int, matched: int, start: int) -> bool:
    """Whether a run from ``start`` gives the whole tail blocks before ``matched``, and all from there on, rightly."""
    rebuilt = stack.run(len(cold[0]), start, cold, matched)
    for layer, window in enumerate(stack.windows):
        tail = matched if window is None else matched - -(-(window - 1) // size) * size
        if rebuilt[layer][tail:] != cold[layer][tail:]:
            return False
    return rebuilt[-1][matched:] == cold[-1][matched:]
