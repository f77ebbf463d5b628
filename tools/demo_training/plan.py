"""What a document is to be like, before anything is written.

Owns: ``Plan``. Must never: draw anything by chance.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a document is like.

    Attributes:
        length: tokens, exactly.
        num_facts: facts told.
        same_attribute: all facts are of one attribute and one thing; only the owners differ.
        held_out: names and values are those never trained on.
        alike: facts differ in one word where they can: owners share pieces of their names, most things and half of the
            places have two attributes.
        clause_rate: share of facts with a clause between name and value.
        num_homes: places told about; each has a fact, and someone whose home it is.
        name_place: the answer to a question through a home names the place before the value.
        repeat_rate: share of the gaps filled with questions asked again instead of filler.
        remind_rate: share of the gaps filled with facts told again, whose values count as answers.
        task_rate: tasks of copying and counting, for each ``documents.TASK_TOKENS`` tokens of the document.
        follow_up_rate: share of questions that are followed by one that refers to them.
        asked_share: share of facts that are asked about at all.
        reminder_share: share of those that are told again instead, by the user, the value counting as an answer.
        reading_share: facts are told in the first part of the document, this share of it.
        ask_after: no fact is asked about before this share of the document, so that what comes before is one long turn.
    """

    length: int
    num_facts: int
    same_attribute: bool
    held_out: bool = False
    alike: bool = False
    clause_rate: float = 0.25
    num_homes: int = 0
    name_place: bool = True
    repeat_rate: float = 0.0
    remind_rate: float = 0.0
    task_rate: float = 0.05
    follow_up_rate: float = 0.15
    asked_share: float = 1.0
    reminder_share: float = 0.0
    reading_share: float = 0.6
    ask_after: float = 0.0
