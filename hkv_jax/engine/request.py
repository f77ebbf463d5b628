"""A request and its sequences: what the scheduler moves from waiting to running to finished.

Owns: the tokens of each sequence and its place in that life. Must never: import jax, or know blocks, buckets or text.
"""

from __future__ import annotations

import dataclasses
import enum
import secrets
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray

from hkv_jax.engine.prefill import Prefill
from hkv_jax.errors import RequestError
from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.outputs import FinishReason, TokenLogprob
from hkv_jax.sampling_params import SamplingParams

NO_LANE = -1
"""The lane of a sequence that is not running."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt and how its continuations are drawn; never changes.

    ``prompt`` i32[prompt tokens] holds the same ids as ``prompt_token_ids``, to be cut into chunks without a Python
    loop. ``stop_ids`` are all ids that end a sequence: the request's own and, unless ignored, the model's.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    prompt: NDArray[np.int32]

    @classmethod
    def create(
        cls,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        eos_token_ids: Iterable[int] = (),
    ) -> Request:
        """A request for a model whose generations end with ``eos_token_ids``; a missing seed is drawn here.

        Raises:
            RequestError: the prompt is empty, or holds something that is no token id of any model.
        """
        ids = tuple(prompt_token_ids)
        if not ids:
            raise RequestError("the prompt has 0 tokens; at least 1 is needed to continue from")
        if not 0 <= min(ids) <= max(ids) < 2**31:
            raise RequestError("the prompt holds an id outside 0 to 2**31 - 1, which no vocabulary has")
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids.update(eos_token_ids)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        return cls(request_id, ids, params, seed, frozenset(stop_ids), np.array(ids, np.int32))

    @property
    def prompt_len(self) -> int:
        """Prompt tokens, at least 1."""
        return len(self.prompt_token_ids)

    @property
    def seed_words(self) -> tuple[int, int]:
        """The seed as (high, low) 32-bit words, each in 0 … 2**32 - 1."""
        return self.seed >> 32, self.seed & 0xFFFFFFFF


class SequenceState(enum.Enum):
    """Where a sequence is in its life; it is in exactly one of these (S2).

    WAITING: holds nothing; in the queue, or with its leader until the prompt can be shared. RUNNING: owns a lane.
    ENDING: its last token is drawn by the step in flight; it holds nothing any more. FINISHED: no result counts now.
    """

    WAITING = "waiting"
    RUNNING = "running"
    ENDING = "ending"
    FINISHED = "finished"


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request.

    Attributes:
        age: (arrival, sample); smaller is older, and goes first.
        max_output_tokens: where length ends it: ``max_tokens``, or what ``max_model_len`` leaves; at least 1.
        output_token_ids: tokens that were drawn *and read*.
        in_flight: tokens drawn but not read when it was preempted; it is not run again before they are read.
        siblings: other samples that will share this one's prompt once it is computed.
        prompt_logprobs: of the prompt tokens read so far, from the first on; ``None`` when nobody asked.
        prefix: how the present (or latest) admission uses cached K/V; ``None`` before the first.
        first_prefix: the same of the first admission, which is what usage reports.
        prefill: its place in the prefix cache while it waits and runs; a new one each time it is queued.
    """

    request: Request
    sample: int
    age: tuple[int, int]
    max_output_tokens: int
    stop_ids: frozenset[int]
    state: SequenceState = SequenceState.WAITING
    lane: int = NO_LANE
    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    in_flight: int = 0
    siblings: list[Sequence] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    prefix: PrefixUse | None = None
    first_prefix: PrefixUse | None = None
    prefill: Prefill = dataclasses.field(default_factory=Prefill.empty)
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None

    @classmethod
    def create(cls, request: Request, sample: int, arrival: int, max_model_len: int) -> Sequence:
        """Sample ``sample`` of ``request``, the ``arrival``-th that came."""
        room = max_model_len - request.prompt_len
        max_tokens = request.params.max_tokens
        sequence = cls(
            request=request,
            sample=sample,
            age=(arrival, sample),
            max_output_tokens=room if max_tokens is None else min(max_tokens, room),
            stop_ids=request.stop_ids,
        )
        if sample == 0 and request.params.prompt_logprobs is not None:
            sequence.prompt_logprobs = [TokenLogprob(request.prompt_token_ids[0], None)]
        return sequence

    @property
    def num_tokens(self) -> int:
        """Tokens known to the host: the prompt and every output that was read."""
        return self.request.prompt_len + len(self.output_token_ids)

    @property
    def max_total_tokens(self) -> int:
        """Tokens it has when length ends it."""
        return self.request.prompt_len + self.max_output_tokens

    @property
    def prefill_end(self) -> int:
        """Where its chunks end: with what it knows, but a prompt that siblings are to share without its last token.

        That token each sample runs by itself.
        """
        return self.request.prompt_len - 1 if self.siblings else self.num_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether logprobs of prompt tokens are still to be computed."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.request.prompt_len

    def tokens(self, start: int, end: int) -> NDArray[np.int32]:
        """Ids of positions ``[start, end)``, i32; all of them must be known."""
        prompt_len = self.request.prompt_len
        if end <= prompt_len:
            return self.request.prompt[start:end]
        outputs = np.array(self.output_token_ids[max(0, start - prompt_len) : end - prompt_len], np.int32)
        return np.concatenate((self.request.prompt[start:], outputs))
