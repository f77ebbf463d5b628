"""English text of any length for checks and measurements on real models; it repeats itself with variation.

Owns: the words. Must never: need more than the standard library, or give different text for the same arguments.
"""

from __future__ import annotations

from itertools import count

_NAMES = ("Ada", "Bruno", "Carla", "Dmitri", "Esther", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Keiko")
_PLACES = (
    "the harbour",
    "the old mill",
    "the observatory",
    "the north station",
    "the botanical garden",
    "the library",
    "the ferry",
)
_THINGS = ("a brass compass", "three letters", "a box of seeds", "the repaired clock", "a roll of maps", "two lamps")
_WEATHER = ("a thin fog", "steady rain", "bright sun", "the first snow", "a warm wind from the south")
_TEXT = """
On the morning of day {day}, {name} walked to {place} with {thing} under one arm. There was {weather} over the
water, and the boats that usually left before sunrise were still tied to the pier. A notice on the door said that
the office would open at {hour}, so there was time for a cup of coffee and a look at yesterday's figures.

The figures did not agree. {other} had counted {number} crates, while the ledger at {place} spoke of {more}. Nobody
had made a mistake on purpose; the difference came from the crates that arrived after the bell and were written down
twice, once in blue ink and once in pencil. {name} drew a line through the second entry and signed it.

In the afternoon a message came from {other}. It asked for {thing} and promised to return everything within {small}
days. The answer was short: yes, as long as someone came to {place} to fetch it, because the road along the coast
had been closed since the storm and the bridge carried nothing heavier than a bicycle.

How does one measure a tide without an instrument? You choose a wall with regular stones, wait for the highest mark,
and count the stones that stay dry. {name} counted {small} at noon and {number} in the evening. The method is crude,
but when it is repeated for a month the errors cancel, and the curve that remains is surprisingly smooth.

Supper was bread, cheese and a soup of lentils. {other} told the story of the winter in which {weather} lasted for
{small} weeks and {place} could only be reached on skis. Everyone had heard it before, and everyone listened, since
each telling added a detail that the earlier ones had left out. This time it was {thing}, found under the ice.

Before going to bed, {name} wrote a list for the next day: first, ask at {place} about the key; second, send {thing}
to {other}; third, compare the {number} readings with those of last year; and finally, sleep longer than {small}
hours. The lamp went out by itself at {hour}, as it had done every night since the spring.
"""
_PARAGRAPHS = tuple(paragraph.strip().replace("\n", " ") for paragraph in _TEXT.split("\n\n"))


def english(num_words: int, story: int = 0) -> str:
    """At least ``num_words`` words of running text. Another ``story`` begins elsewhere and is told of others."""
    words = 0
    told: list[str] = []
    for step in count():
        if words >= num_words:
            return "\n\n".join(told)
        turn = step + 5 * story
        paragraph = _PARAGRAPHS[(step + story) % len(_PARAGRAPHS)].format(
            day=turn + 1,
            name=_NAMES[(3 * turn + story) % len(_NAMES)],
            other=_NAMES[(3 * turn + story + 1 + turn % 7) % len(_NAMES)],
            place=_PLACES[(turn * turn + story) % len(_PLACES)],
            thing=_THINGS[(turn * 5 + story + turn // 6) % len(_THINGS)],
            weather=_WEATHER[(turn * 2 + story) % len(_WEATHER)],
            number=40 + 17 * turn % 311,
            more=47 + 17 * turn % 311,
            small=2 + turn % 9,
            hour=f"{6 + turn % 5} o'clock",
        )
        words += len(paragraph.split())
        told.append(paragraph)
    raise AssertionError("counts without end")
