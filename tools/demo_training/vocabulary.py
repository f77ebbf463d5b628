"""The words the demo model knows: what its documents are made of and its tokens are named after.

Owns: the word lists, and which names and values are kept for evaluation. Must never: know a sentence's shape
(``grammar`` does) or a token's id (``tokenizer`` does).
"""

from __future__ import annotations

import hashlib
from functools import cache

PAD, EOS, BOS, UNK, USER, MODEL, END = SPECIAL_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<user>",
    "<model>",
    "<end>",
)

NAME_STARTS = (
    *(
        "A",
        "Al",
        "Ba",
        "Be",
        "Bo",
        "Ca",
        "Co",
        "Da",
        "De",
        "Do",
        "E",
        "El",
        "Fa",
        "Fi",
        "Ga",
        "Gi",
        "Ha",
        "He",
        "I",
        "Jo",
    ),
    *(
        "Ka",
        "Ki",
        "La",
        "Le",
        "Lu",
        "Ma",
        "Mi",
        "Na",
        "Ni",
        "O",
        "Pe",
        "Ra",
        "Ro",
        "Sa",
        "Si",
        "Ta",
        "Te",
        "U",
        "Vi",
        "Zo",
    ),
)
NAME_ENDS = (
    *(
        "bel",
        "cy",
        "da",
        "den",
        "dra",
        "fin",
        "ga",
        "ger",
        "ka",
        "ke",
        "la",
        "lia",
        "lin",
        "lo",
        "man",
        "mas",
        "mi",
        "na",
    ),
    *("nor", "ny", "ra", "ria", "ron", "sa", "ssa", "ta", "than", "tin", "vin", "zo"),
)
ATTRIBUTES = ("key", "code", "size", "price", "weight", "number", "mark", "length")
OBJECTS = ("box", "door", "boat", "bag", "clock", "house", "cart", "coat", "drum", "lamp", "map", "ring")
HOME = "home"
HOMES = (
    *("abbey", "bakery", "barn", "cabin", "castle", "cave", "chapel", "cottage", "dairy", "dock"),
    *("farm", "ferry", "fort", "fountain", "gate", "hall", "hotel", "inn", "jetty", "library"),
    *("lodge", "manor", "museum", "orchard", "palace", "park", "pier", "pond", "school", "shop"),
    *("square", "stable", "station", "temple", "theater", "vault", "well", "windmill", "workshop", "yard"),
)
COUNTED = ("bird", "star", "apple", "stone", "coin", "leaf")
REPEATED = ("river", "stone", "bird", "lamp", "apple", "moon", "horse", "bell", "cloud", "tree", "fish", "gold")

SUBJECTS = ("baker", "sailor", "farmer", "painter", "child", "doctor", "miller", "singer", "guard", "smith")
ADJECTIVES = ("old", "young", "quiet", "tall", "kind", "busy", "tired", "happy", "brave", "slow")
VERBS = ("found", "saw", "sold", "moved", "painted", "carried", "washed", "kept", "left", "liked")
THINGS = ("basket", "chair", "rope", "book", "cup", "table", "wheel", "flag", "blanket", "candle")
COLORS = ("red", "blue", "green", "white", "black", "yellow", "brown", "gray")
PLACES = ("river", "market", "hill", "bridge", "forest", "garden", "harbor", "mill", "tower", "village")
TIMES = ("morning", "evening", "spring", "summer", "autumn", "winter", "week", "night")
LINKS = (
    "near",
    "behind",
    "beside",
    "under",
    "before",
    "after",
    "with",
    "for",
    "from",
    "in",
    "at",
    "to",
    "of",
    "by",
    "on",
)
FUNCTION_WORDS = (
    *(
        "the",
        "a",
        "and",
        "is",
        "are",
        "was",
        "it",
        "has",
        "which",
        "that",
        "who",
        "what",
        "when",
        "where",
        "there",
        "here",
    ),
    *(
        "last",
        "this",
        "one",
        "every",
        "while",
        "then",
        "rain",
        "wind",
        "snow",
        "sun",
        "came",
        "went",
        "stayed",
        "again",
    ),
    *("number", "numbers", "word", "words", "many", "how", "about", "me", "you", "do", "see", "count", "copy", "say"),
)
# Sentences and turns begin with these; at the start of a turn they have no space before them.
OPENERS = ("The", "A", "What", "Who", "How", "It", "And", "Copy", "Say", "There", "In", "When", "Count")
PUNCTUATION = (".", ",", "?", ":", "'s", "!", ";", "-", "(", ")", '"', "'", "/")

WORDS = tuple(
    dict.fromkeys(
        (
            *FUNCTION_WORDS,
            *LINKS,
            *ATTRIBUTES,
            *OBJECTS,
            HOME,
            *HOMES,
            *COUNTED,
            *REPEATED,
            *SUBJECTS,
            *ADJECTIVES,
            *VERBS,
            *THINGS,
            *COLORS,
            *PLACES,
            *TIMES,
        )
    )
)

VALUE_DIGITS = 4
"""Digits of a value: a value is 1000 to 9999, so that none begins with 0."""
_HELD_OUT_ONE_IN = 6


def is_held_out(name_or_value: str) -> bool:
    """Whether a name or a value is never trained on, but for evaluation: every sixth, by a hash of the text."""
    return hashlib.sha256(name_or_value.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


@cache
def names(*, held_out: bool) -> tuple[str, ...]:
    """All names of two pieces of one of the two halves, in a fixed order."""
    return tuple(name for start in NAME_STARTS for end in NAME_ENDS if is_held_out(name := start + end) == held_out)


@cache
def values(*, held_out: bool) -> tuple[str, ...]:
    """All values of one of the two halves, in order."""
    low, high = 10 ** (VALUE_DIGITS - 1), 10**VALUE_DIGITS
    return tuple(value for number in range(low, high) if is_held_out(value := str(number)) == held_out)
