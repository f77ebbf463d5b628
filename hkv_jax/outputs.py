"""What generation returns: plain data shared by the Python face, the JSON of the command line and the gRPC service.

Field names and meanings are those of the wire format; must never import jax, and holds no behaviour.
"""

from __future__ import annotations

import dataclasses
import enum


class FinishReason(enum.StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with the natural logarithm of its probability under the model's own distribution.

    ``logprob`` is ``None`` only for the first token of a prompt. ``top`` holds ``(token_id, logprob)`` of the most
    likely tokens, most likely first; the token itself may or may not be among them.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class PrefixHit(enum.StrEnum):
    """How what was cached of a prompt's beginning served the request.

    Values:
        MISS: nothing was skipped; the whole prompt was computed.
        RESIDENT: every layer's K/V was there, up to the end of what is cached.
        TRUNCATE: the K/V of the sliding windows before that end was gone; an earlier place where it was still there
            served instead.
        REBUILD: it was gone, and was computed again from a little before that end, for a part of the prefix's work.
    """

    MISS = "miss"
    RESIDENT = "resident"
    TRUNCATE = "truncate"
    REBUILD = "rebuild"


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request; prompt tokens count once, whatever the number of samples.

    Attributes:
        prompt_tokens, completion_tokens: tokens of the prompt, and of all samples together.
        cached_tokens: prompt tokens that were not computed, because their K/V was cached.
        prefix_hit: how the cached prefix served.
        rebuilt_tokens: prompt tokens that were computed although the global layers had them cached, because the sliding
            layers' K/V had to be there again.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    prefix_hit: PrefixHit = PrefixHit.MISS
    rebuilt_tokens: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One sample of one prompt, or (in a stream) only what is new of it.

    ``token_ids`` contains the stop id that ended it, ``text`` does not. ``stop_reason`` is that id, or the stop string.
    """

    sample: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class RequestOutput:
    """Everything that came back for one prompt."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Completion, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class StreamDelta:
    """What is new for a request since the last delta: one sample's continuation.

    ``prompt_logprobs`` comes with the first delta only, ``usage`` with the last one only.
    """

    request_id: str
    completion: Completion
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    usage: Usage | None = None
