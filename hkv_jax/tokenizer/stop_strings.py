"""Looks for stop strings in text that arrives in pieces, and holds back what might become one.

Owns: where a text ends because of a stop string. What it finds does not depend on how the text was cut into pieces.
Must never: know tokens or requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The stop strings of a request as an Aho-Corasick automaton; never changes, shared by its samples.

    A state stands for the longest end of the text read so far that begins a stop string. State 0: there is none.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """An automaton of non-empty ``strings``, in time and memory linear in their length."""
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.depths = [0]
        self.matches: list[str | None] = [None]
        for string in strings:
            self.matches[self._path(string)] = string
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character; amortised constant time."""
        transitions = self._next
        while state and character not in transitions[state]:
            state = self._fallback[state]
        return transitions[state].get(character, 0)

    def _path(self, string: str) -> int:
        """Adds the states of a string; returns the last."""
        state = 0
        for character in string:
            following = self._next[state].get(character)
            if following is None:
                following = len(self._next)
                self._next[state][character] = following
                self._next.append({})
                self._fallback.append(0)
                self.depths.append(self.depths[state] + 1)
                self.matches.append(None)
            state = following
        return state

    def _link(self) -> None:
        """Breadth first: where to go on when a state has no transition, and which string ends there."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            fallback = self._fallback[state]
            if self.matches[state] is None:
                self.matches[state] = self.matches[fallback]
            for character, following in self._next[state].items():
                self._fallback[following] = self.step(fallback, character)
                queue.append(following)


class StopScanner:
    """One text, read piece by piece.

    The stop string that is complete first counts; of several that end at the same character, the longest. ``matched``
    is that string, ``None`` before.
    """

    def __init__(self, strings: StopStrings, *, include: bool) -> None:
        """A scanner at the start of a text; ``include``: the text ends after the stop string instead of before it."""
        self._strings = strings
        self._include = include
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, armed: bool = True) -> str:
        """Reads a piece; returns the text that is certain now. Nothing may follow once ``matched`` is set.

        What was read might still become a stop string is returned by a later call. Strings that would be complete
        while not ``armed`` do not count.
        """
        strings, state = self._strings, self._state
        for index, character in enumerate(text):
            state = strings.step(state, character)
            found = strings.matches[state]
            if found is not None and armed:
                self.matched = found
                whole = self._held + text[: index + 1]
                self._held = ""
                return whole if self._include else whole[: -len(found)]
        self._state = state
        whole = self._held + text
        certain = len(whole) - strings.depths[state]
        self._held = whole[certain:]
        return whole[:certain]

    def flush(self) -> str:
        """The text that was held back; for the end of a text without a stop string."""
        held, self._held = self._held, ""
        return held
