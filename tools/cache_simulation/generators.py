"""Seeded request traces of several kinds of traffic.

Owns: what chats, questions to documents, long and short requests look like. Must never: depend on anything but the
seed; the same seed gives the same trace, and traces of different seeds share no token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tools.cache_simulation.trace import OUTPUT_PREFIX, TraceRequest


@dataclasses.dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal token counts: ``median``, ``spread`` (of the logarithm), cut to ``[low, high]``."""

    median: float
    spread: float
    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        """One of them."""
        return int(np.clip(rng.lognormal(np.log(self.median), self.spread), self.low, self.high))


ANSWERS = Lengths(156, 0.83, 16, 1024)
SYSTEM_PROMPTS = (600, 1500, 2400, 3100)


def chat(seed: int, conversations: int = 160, seconds: float = 38.0) -> list[TraceRequest]:
    """Conversations of 3 to 10 turns behind one of four system prompts, some more popular than others.

    They begin at random moments of the first ``seconds``; a user thinks for 10 s on average, and every turn's prompt is
    all that was said before and one more message.
    """
    rng = np.random.default_rng((seed, 1))
    popularity = _zipf(len(SYSTEM_PROMPTS), rng)
    requests = []
    for number, arrival in enumerate(_moments(rng, conversations, seconds)):
        system = int(rng.choice(len(SYSTEM_PROMPTS), p=popularity))
        said = [(f"chat{seed}:system{system}", SYSTEM_PROMPTS[system])]
        before: TraceRequest | None = None
        for turn in range(int(min(10, 2 + rng.geometric(0.2)))):
            said.append((f"chat{seed}:user{number}.{turn}", Lengths(34, 1.04, 3, 1000).draw(rng)))
            request = TraceRequest(
                request_id=f"chat{seed}.{number}.{turn}",
                arrival=arrival,
                after=before.request_id if before else None,
                think=round(float(rng.exponential(10.0)), 3) if before else 0.0,
                segments=tuple(said),
                output_len=ANSWERS.draw(rng),
            )
            requests.append(request)
            said.append((OUTPUT_PREFIX + request.request_id, request.output_len))
            before = request
    return requests


def documents(seed: int, questions: int = 160, seconds: float = 175.0, num_documents: int = 16) -> list[TraceRequest]:
    """Short questions to long documents (16k to 64k tokens) behind two system prompts, popular documents more often."""
    rng = np.random.default_rng((seed, 2))
    texts = []
    for number, length in enumerate(rng.integers(16_384, 65_536 - 4096, num_documents)):
        system = f"documents{seed}:system{rng.integers(2)}"
        texts.append(((system, 800), (f"documents{seed}:text{number}", int(length))))
    popularity = _zipf(num_documents, rng)
    requests = []
    for number, arrival in enumerate(_moments(rng, questions, seconds)):
        question = (f"documents{seed}:question{number}", Lengths(45, 0.6, 8, 512).draw(rng))
        segments = (*texts[int(rng.choice(num_documents, p=popularity))], question)
        answer = Lengths(131, 0.69, 16, 600).draw(rng)
        requests.append(TraceRequest(f"documents{seed}.{number}", arrival, None, 0.0, segments, answer))
    return requests


def mixed(seed: int, count: int = 600, seconds: float = 102.0) -> list[TraceRequest]:
    """Requests that share nothing: nine of ten short, the others of 8k to 64k tokens."""
    rng = np.random.default_rng((seed, 3))
    lengths = [
        int(rng.integers(8192, 64_512)) if rng.random() < 0.1 else Lengths(110, 1.2, 4, 4096).draw(rng)
        for _ in range(count)
    ]
    moments = _moments(rng, count, seconds)
    return [
        _alone(f"mixed{seed}.{number}", moment, length, Lengths(128, 0.95, 2, 1024).draw(rng))
        for number, (moment, length) in enumerate(zip(moments, lengths, strict=True))
    ]


def long_prompts(seed: int, count: int = 48) -> list[TraceRequest]:
    """Prompts of 8k to 128k tokens, all at once."""
    rng = np.random.default_rng((seed, 4))
    return [
        _alone(f"long{seed}.{number}", 0.0, int(rng.integers(8192, 130_048)), int(rng.integers(64, 512)))
        for number in range(count)
    ]


def short_prompts(seed: int, count: int = 1000) -> list[TraceRequest]:
    """Short questions with answers of like length, as people share them, all at once."""
    rng = np.random.default_rng((seed, 5))
    return [
        _alone(
            f"short{seed}.{number}", 0.0, Lengths(97, 1.25, 4, 4096).draw(rng), Lengths(117, 0.95, 4, 1024).draw(rng)
        )
        for number in range(count)
    ]


def alternating(seed: int, rounds: int = 3, seconds: float = 200.0) -> list[TraceRequest]:
    """Chat and questions to the same documents by turns, each for half of ``seconds`` a round.

    A cache has to give memory back and forth: chats want many short windows, documents want long prefixes.
    """
    half = seconds / 2
    talk = chat(seed, conversations=rounds * 80, seconds=rounds * 40.0)
    questions = documents(seed, questions=rounds * 60, seconds=rounds * half)
    # Chats that begin in 40 s go on for about as long as the half has.
    moved = [dataclasses.replace(one, arrival=_spread(one.arrival, 40.0, seconds)) for one in talk]
    moved += [dataclasses.replace(one, arrival=_spread(one.arrival, half, seconds) + half) for one in questions]
    return sorted(moved, key=lambda request: request.arrival)


GENERATORS: dict[str, Callable[[int], list[TraceRequest]]] = {
    "alternating": alternating,
    "chat": chat,
    "docqa": documents,
    "longctx": long_prompts,
    "mixed": mixed,
    "sharegpt": short_prompts,
}
"""By the name of the trace they make."""


def _alone(request_id: str, arrival: float, prompt_len: int, output_len: int) -> TraceRequest:
    return TraceRequest(request_id, arrival, None, 0.0, ((f"{request_id}:prompt", prompt_len),), output_len)


def _moments(rng: np.random.Generator, count: int, seconds: float) -> list[float]:
    """``count`` moments in ``[0, seconds)`` as independent users choose them, ascending."""
    return [round(float(moment), 4) for moment in np.sort(rng.uniform(0, seconds, count))]


def _zipf(count: int, rng: np.random.Generator) -> np.ndarray:
    """How popular each of ``count`` things is: the k-th most popular in proportion to 1 / k, in random order."""
    weights = 1.0 / np.arange(1, count + 1)
    popularity: np.ndarray = rng.permutation(weights / weights.sum())
    return popularity


def _spread(moment: float, part: float, period: float) -> float:
    """Moments of one stretch of time, dealt out to the first ``part`` seconds of each period."""
    number, inside = divmod(moment, part)
    return round(number * period + inside, 4)
