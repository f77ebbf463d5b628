"""The output thread: one order for each client, late tokens dropped, trouble kept to the request it is of."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hkv_jax.engine.outbox import RequestStream
from hkv_jax.engine.output_processor import LivingRequest, OutputListener, OutputProcessor
from hkv_jax.engine.request import Request, Sequence
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.errors import EngineStoppedError, InternalError
from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.outputs import FinishReason, PrefixHit, Usage
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.tiny_tokenizer import byte_level_tokenizer, write_tokenizer
from hkv_jax.tokenizer import Tokenizer

LIBRARY = byte_level_tokenizer()


@dataclasses.dataclass
class Output:
    """A processor, and what it told the loop: (what, request id, sample)."""

    tokenizer: Tokenizer
    told: list[tuple[str, str, int]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        def teller(what: str) -> Callable[[LivingRequest], None]:
            return lambda living: self.told.append((what, living.request.request_id, 0))

        def stopped(living: LivingRequest, sample: int) -> None:
            self.told.append(("stopped", living.request.request_id, sample))

        self.processor = OutputProcessor(
            OutputListener(began=teller("began"), stopped=stopped, ended=teller("ended"), broken=teller("broken"))
        )

    def add(self, request_id: str, **params: Any) -> tuple[LivingRequest, RequestStream, list[Sequence]]:
        request = Request.create(request_id, LIBRARY.encode("the").ids, SamplingParams(**params))
        living = LivingRequest.create(request, self.tokenizer)
        self.processor.add(living)
        sequences = [Sequence.create(request, sample, 0, 1000) for sample in range(request.params.n)]
        return living, RequestStream(request, living.outbox, lambda: None), sequences

    def take(self, text: str, *sequences: Sequence) -> None:
        """The tokens of ``text`` for each of the sequences, a step each."""
        for token_id in LIBRARY.encode(text, add_special_tokens=False).ids:
            self.processor.take([TokenEvent(sequence, token_id) for sequence in sequences])

    def close(self) -> None:
        self.processor.close([], EngineStoppedError("closed"))
        self.processor.join()


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Output]:
    write_tokenizer(tmp_path, LIBRARY)
    made = Output(Tokenizer.from_folder(tmp_path))
    yield made
    made.close()


def test_tokens_after_a_stop_string_are_dropped_whenever_it_was_noticed(output: Output) -> None:
    _, stream, (sequence,) = output.add("r", stop="cat")
    output.take(" the cat sat on the mat", sequence)
    result = stream.result()
    assert result.outputs[0].text == " the "
    assert result.outputs[0].token_ids == tuple(LIBRARY.encode(" the cat", add_special_tokens=False).ids)
    assert result.usage == Usage(len(result.prompt_token_ids), 2)
    output.close()
    assert output.told == [("began", "r", 0), ("stopped", "r", 0), ("ended", "r", 0)]


def test_a_request_ends_with_its_last_sample(output: Output) -> None:
    _, stream, sequences = output.add("r", n=2, stop="cat")
    output.take(" cat sat", sequences[1])  # the last token comes after the stop string
    output.take(" the cat", sequences[0])
    result = stream.result()
    assert [completion.text for completion in result.outputs] == [" the ", " "]
    assert result.usage.completion_tokens == 3
    output.close()
    assert output.told == [("began", "r", 0), ("stopped", "r", 1), ("stopped", "r", 0), ("ended", "r", 0)]


def test_usage_tells_how_the_prompt_of_sample_0_was_first_served(output: Output) -> None:
    _, stream, sequences = output.add("r", n=2, stop="cat")
    for start, sequence in enumerate(sequences):
        sequence.first_prefix = PrefixUse(start=start + 1, matched=3, hit=PrefixHit.REBUILD, context_start=start + 1)
        sequence.prefix = PrefixUse(start=0, matched=0, hit=PrefixHit.MISS, context_start=0)
    output.take(" the", sequences[1])
    output.take(" cat", sequences[0])
    output.take(" cat", sequences[1])
    usage = stream.result().usage
    assert (usage.cached_tokens, usage.prefix_hit, usage.rebuilt_tokens) == (1, PrefixHit.REBUILD, 2)


def test_a_request_that_ends_before_its_first_token_has_used_no_prefix(output: Output) -> None:
    living, stream, _ = output.add("r")
    output.processor.abort(living)
    result = stream.result()
    assert result.usage == Usage(len(result.prompt_token_ids), 0, 0, PrefixHit.MISS, 0)


def test_tokens_of_an_ended_request_do_not_reach_a_new_one_with_its_id(output: Output) -> None:
    old, _, (old_sequence,) = output.add("r")
    output.take(" the", old_sequence)
    output.processor.abort(old)
    _, stream, (sequence,) = output.add("r", stop="mat")
    output.take(" cat", old_sequence)
    output.take(" on mat", sequence)
    assert stream.result().outputs[0].text == " on "


def test_an_abort_ends_what_is_open(output: Output) -> None:
    living, stream, sequences = output.add("r", n=2, stop="cat")
    output.take(" cat", sequences[0])
    output.take(" the", sequences[1])
    output.processor.abort(living)
    output.processor.abort(living)
    result = stream.result()
    reasons = [completion.finish_reason for completion in result.outputs]
    assert reasons == [FinishReason.STOP, FinishReason.ABORT]
    assert result.usage.completion_tokens == 2


def test_a_defect_ends_its_own_request_only(output: Output, caplog: pytest.LogCaptureFixture) -> None:
    broken, stream, (sequence,) = output.add("broken")
    _, other, (other_sequence,) = output.add("other", stop="cat")
    broken.samples = ()
    with caplog.at_level(logging.ERROR):
        output.take(" the cat", sequence, other_sequence)
        assert other.result().outputs[0].text == " the "
    with pytest.raises(InternalError) as raised:
        stream.result()
    (record,) = caplog.records
    assert record.getMessage() == f"{raised.value}: the output of request broken is given up"
    assert [told for told in output.told if told[1] == "broken"] == [("broken", "broken", 0), ("ended", "broken", 0)]


def test_what_is_open_at_the_end_fails(output: Output) -> None:
    living, stream, (sequence,) = output.add("r")
    done, done_stream, (done_sequence,) = output.add("done", stop="cat")
    output.take(" the", sequence)
    output.take(" cat", done_sequence)
    output.processor.close([living, done], EngineStoppedError("closed"))
    output.processor.join()
    assert done_stream.result().outputs[0].text == " "
    delta = stream.get()
    assert delta is not None
    assert delta.completion.text == " the"
    with pytest.raises(EngineStoppedError):
        stream.get()
