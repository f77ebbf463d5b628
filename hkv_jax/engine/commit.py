"""Reading a step: drawn tokens are appended to their sequences, stops are noticed, events are made.

Owns: what a token means to the sequence that drew it. Must never: import jax, or touch lanes and blocks (the
scheduler's ``finish`` does). The loop over decode rows is the one Python loop of a steady step: it stays lean.
"""

from __future__ import annotations

from collections.abc import Callable

from hkv_jax.engine.plan import Chunk, StepPlan
from hkv_jax.engine.request import Sequence, SequenceState
from hkv_jax.engine.step_result import Logprobs, StepResult
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.outputs import FinishReason

Finish = Callable[[Sequence, FinishReason, int | None], None]


def commit_step(plan: StepPlan, result: StepResult, finish: Finish) -> list[TokenEvent]:
    """Appends the tokens of ``result`` and returns an event for each that counts, in row order.

    A sequence that was preempted after the step was dispatched takes its token; one that finished (stopped, aborted)
    meanwhile drops it. ``finish(sequence, reason, stop id)`` is called for each sequence that its token ends.
    """
    tokens = result.tokens[: plan.num_rows].tolist()
    num_decodes = len(plan.decode.sequences)
    events = _take_tokens(plan.decode.sequences, tokens[:num_decodes], finish)
    offset = num_decodes
    for chunk, token in zip(plan.chunks, tokens[num_decodes:], strict=True):
        if result.prompt_logprobs is not None:
            _take_prompt_logprobs(chunk, result.prompt_logprobs, offset)
        if chunk.samples:
            events += _take_tokens((chunk.sequence,), [token], finish)
        offset += chunk.num_tokens
    if result.logprobs is not None:
        _add_logprobs(plan, events, result.logprobs)
    return events


def _take_tokens(sequences: tuple[Sequence, ...], tokens: list[int], finish: Finish) -> list[TokenEvent]:
    finished, waiting = SequenceState.FINISHED, SequenceState.WAITING
    events = []
    for sequence, token in zip(sequences, tokens, strict=True):
        state = sequence.state
        if state is finished:
            continue
        if state is waiting:
            assert sequence.in_flight == 1, "a waiting sequence has a token nobody counted"
            sequence.in_flight = 0
        outputs = sequence.output_token_ids
        outputs.append(token)
        event = TokenEvent(sequence, token)
        events.append(event)
        if len(outputs) == 1 and sequence.prompt_logprobs is not None:
            event.prompt_logprobs = tuple(sequence.prompt_logprobs)
        if token in sequence.stop_ids and len(outputs) > sequence.request.params.min_tokens:
            event.finish_reason, event.stop_reason = FinishReason.STOP, token
            finish(sequence, FinishReason.STOP, token)
        elif len(outputs) == sequence.max_output_tokens:
            event.finish_reason = FinishReason.LENGTH
            finish(sequence, FinishReason.LENGTH, None)
    return events


def _take_prompt_logprobs(chunk: Chunk, logprobs: Logprobs, offset: int) -> None:
    """Appends those of the prompt tokens that follow the chunk's, unless they were there before a preemption."""
    sequence = chunk.sequence
    num_top = sequence.request.params.prompt_logprobs
    if not chunk.wants_prompt_logprobs or sequence.prompt_logprobs is None or num_top is None:
        return
    prompt = sequence.request.prompt_token_ids
    known = len(sequence.prompt_logprobs)
    assert known > chunk.start, "prompt logprobs before this chunk are missing"
    for position in range(known, min(chunk.end + 1, len(prompt))):
        entry = logprobs.of(offset + position - 1 - chunk.start, prompt[position], num_top)
        sequence.prompt_logprobs.append(entry)


def _add_logprobs(plan: StepPlan, events: list[TokenEvent], logprobs: Logprobs) -> None:
    """Completes the events of the sequences that asked; a sequence has one row and at most one event a step."""
    row_of = {id(sequence): row for row, sequence in enumerate(plan.sequences)}
    for event in events:
        num_top = event.sequence.request.params.logprobs
        if num_top is not None:
            event.logprob = logprobs.of(row_of[id(event.sequence)], event.token_id, num_top)
