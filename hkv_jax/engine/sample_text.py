"""One sample on its way out: tokens become pieces of a completion.

Owns: where the text of a sample ends. Must never: know threads or the engine.
"""

from __future__ import annotations

from hkv_jax.engine.request import Request
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.outputs import Completion, FinishReason
from hkv_jax.tokenizer import Detokenizer, StopScanner, StopStrings


class SampleText:
    """The output of one sample so far.

    The text lags behind the tokens where a character is unfinished or a stop string may be beginning; the last piece
    brings what is left. The token that completes a stop string is the sample's last.
    """

    def __init__(
        self, request: Request, sample: int, detokenizer: Detokenizer | None, stop_strings: StopStrings | None
    ) -> None:
        """A sample without output; no ``detokenizer``: no text, and no stop strings then."""
        params = request.params
        self.ended = False
        self._sample = sample
        self._detokenizer = detokenizer
        self._scanner = None
        if stop_strings is not None:
            self._scanner = StopScanner(stop_strings, include=params.include_stop_str_in_output)
        self._wants_logprobs = params.logprobs is not None
        self._min_tokens = params.min_tokens
        self._num_tokens = 0

    def push(self, event: TokenEvent) -> Completion:
        """What one more token brings; ``finish_reason`` is set when it is the last, be it by a stop string."""
        self._num_tokens += 1
        text = self._text_of(event)
        reason, stop_reason = event.finish_reason, event.stop_reason
        final: int | str | None = stop_reason
        if self._scanner is not None and self._scanner.matched is not None:
            reason, final = FinishReason.STOP, self._scanner.matched
        self.ended = reason is not None
        logprobs = (event.logprob,) if self._wants_logprobs and event.logprob is not None else None
        return Completion(self._sample, text, (event.token_id,), logprobs, reason, final)

    def abort(self) -> Completion:
        """The end of a sample that gets no more tokens."""
        self.ended = True
        return Completion(self._sample, self._rest(""), (), () if self._wants_logprobs else None, FinishReason.ABORT)

    def _text_of(self, event: TokenEvent) -> str:
        if self._detokenizer is None:
            return ""
        # A stop id is no text.
        text = "" if event.stop_reason is not None else self._detokenizer.push(event.token_id)
        if event.finish_reason is not None:
            return self._rest(text)
        return text if self._scanner is None else self._scan(text)

    def _rest(self, text: str) -> str:
        """``text`` and all that was held back, up to a stop string in it."""
        if self._detokenizer is not None:
            text += self._detokenizer.flush()
        if self._scanner is None:
            return text
        text = self._scan(text)
        return text if self._scanner.matched is not None else text + self._scanner.flush()

    def _scan(self, text: str) -> str:
        assert self._scanner is not None
        return self._scanner.push(text, armed=self._num_tokens > self._min_tokens)
