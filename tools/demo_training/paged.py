"""The demo model's answers through the paged engine, whole or damaged.

Owns: running questions in a small float32 engine. Must never: judge what a right answer is worth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from hkv_jax.kvcache.manager import CacheManager
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.probe import Probe, ProbeOptions
from tools.demo_training.questions import END_OF_ANSWER, Question

MAX_ANSWER_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class PagedRun:
    """How questions are run: the probe's programs, the largest chunk, in what company.

    ``together``: all questions at once, in the lanes there are; else one after the other. ``crowded``: in pools so
    small that sequences must give way. ``damage`` is done to the cache of each engine before its first request.
    """

    options: ProbeOptions
    chunk: int
    together: bool = True
    crowded: bool = False
    damage: Callable[[CacheManager, Sequence[Question]], None] | None = None


@dataclasses.dataclass(frozen=True)
class PagedAnswers:
    """Greedy tokens of each question, up to the end of the answer, and how often a sequence gave way."""

    tokens: list[list[int]]
    num_preemptions: int


def answer(run: PagedRun, questions: Sequence[Question]) -> PagedAnswers:
    """The answers, in the order of ``questions``."""
    params = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0, stop_token_ids=(END_OF_ANSWER,))
    tokens: list[list[int]] = []
    preemptions = 0
    for batch in [questions] if run.together else [[one] for one in questions]:
        probe = Probe(run.options, run.chunk, crowded=run.crowded)
        if run.damage is not None:
            run.damage(probe.cache, batch)
        found = probe.generate({str(index): one.prompt for index, one in enumerate(batch)}, params)
        tokens += [found[str(index)] for index in range(len(batch))]
        preemptions += probe.scheduler.num_preemptions
    return PagedAnswers(tokens, preemptions)


def num_right(answers: Sequence[list[int]], questions: Sequence[Question]) -> int:
    """Questions answered exactly, to the last token."""
    return sum(found == question.answer for found, question in zip(answers, questions, strict=True))
