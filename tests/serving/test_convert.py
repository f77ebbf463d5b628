"""Every field survives the way to the wire and back."""

from __future__ import annotations

import dataclasses

import grpc
import pytest

from hkv_jax.engine.prefix_stats import PrefixStats
from hkv_jax.errors import EngineStoppedError, HkvError, InternalError, OverloadedError, RequestError
from hkv_jax.outputs import Completion, FinishReason, PrefixHit, RequestOutput, StreamDelta, TokenLogprob, Usage
from hkv_jax.sampling_params import SamplingParams
from serving import convert
from serving.info import PoolInfo, ServerInfo, all_global_peak_bytes
from serving.proto import hkv_inference_pb2 as pb
from serving.status import error_of, status_of

LOGPROBS = (TokenLogprob(5, None), TokenLogprob(6, -0.5, ((6, -0.5), (7, -1.25))))
DELTAS = [
    StreamDelta("a", Completion(0, "", (1,))),
    StreamDelta("a", Completion(3, "é", (0, 9), LOGPROBS, FinishReason.STOP, 0)),
    StreamDelta("a", Completion(3, "x", (4,), None, FinishReason.STOP, "stop")),
    StreamDelta("a", Completion(0, "", (4,), None, FinishReason.LENGTH), LOGPROBS, Usage(7, 3, 2, PrefixHit.RESIDENT)),
    StreamDelta("a", Completion(0, "", (), None, FinishReason.ABORT), None, Usage(7, 0)),
]


@pytest.mark.parametrize("delta", DELTAS)
def test_deltas(delta: StreamDelta) -> None:
    message = pb.GenerateChunk.FromString(convert.delta_to_wire(delta).SerializeToString())
    assert convert.delta_from_wire(message) == delta


def test_whole_outputs() -> None:
    output = RequestOutput(
        "a", (1, 2), tuple(delta.completion for delta in DELTAS), Usage(7, 3, 2, PrefixHit.REBUILD, 1), LOGPROBS
    )
    message = convert.output_to_wire(output)
    assert tuple(map(convert.completion_from_wire, message.outputs)) == output.outputs
    assert convert.logprobs_from_wire(message.prompt_logprobs) == LOGPROBS
    assert convert.usage_from_wire(message.usage) == output.usage
    assert message.request_id == "a"


@pytest.mark.parametrize("hit", PrefixHit)
def test_every_kind_of_prefix_hit(hit: PrefixHit) -> None:
    message = convert.usage_to_wire(Usage(9, 3, 4, hit, 2))
    assert pb.PrefixHit.Name(message.prefix_hit) == f"PREFIX_HIT_{hit.name}"
    assert convert.usage_from_wire(message) == Usage(9, 3, 4, hit, 2)


def test_an_older_server_says_nothing_of_prefixes() -> None:
    assert convert.usage_from_wire(pb.Usage(prompt_tokens=9)) == Usage(9, 0, 0, PrefixHit.MISS, 0)


ALL_SET = SamplingParams(
    max_tokens=9,
    min_tokens=3,
    temperature=0.7,
    top_k=4,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.1,
    presence_penalty=-0.5,
    frequency_penalty=0.5,
    logit_bias={3: -1.5, 0: 100.0},
    seed=2**63 - 1,
    n=2,
    stop=("a", "b"),
    include_stop_str_in_output=True,
    stop_token_ids=(1, 2),
    ignore_eos=True,
    logprobs=0,
    prompt_logprobs=20,
    detokenize=True,
    skip_special_tokens=False,
)


def test_sampling_options_and_which_of_them_are_set() -> None:
    assert ALL_SET.set_fields == {field.name for field in dataclasses.fields(SamplingParams) if field.init}
    for params in (SamplingParams(), SamplingParams(temperature=0, ignore_eos=False), ALL_SET):
        message = pb.SamplingParams.FromString(convert.sampling_to_wire(params).SerializeToString())
        back = convert.sampling_from_wire(message)
        assert back == params
        assert back.set_fields == params.set_fields


def test_server_info() -> None:
    pool = PoolInfo("sliding", 16, 4096, 10, 3, 5, 99, 4)
    pools = (pool, dataclasses.replace(pool, name="global"))
    hits = {hit: count for count, hit in enumerate(PrefixHit)}
    prefix = PrefixStats(hits, 700, 400, 50, 300, 20, 6)
    for all_global in (None, 0, 2**40):
        info = ServerInfo("0.1", "m", 100, 1000, 8, 1, 2, pools, all_global, prefix, 11, 2**41)
        assert convert.info_from_wire(convert.info_to_wire(info)) == info


def test_an_all_global_cache_holds_every_token_in_every_pool() -> None:
    # 4 blocks of 32 tokens were in use: 128 tokens, 8 blocks of 16 in a sliding pool that never lets go.
    pools = [PoolInfo("global", 32, 100, 50, 0, 4, 0, 0), PoolInfo("sliding", 16, 1000, 50, 0, 3, 9, 0)]
    assert all_global_peak_bytes(pools) == 4 * 100 + 8 * 1000
    assert all_global_peak_bytes(pools[1:]) is None


@pytest.mark.parametrize("error", [RequestError("why"), OverloadedError("why"), EngineStoppedError("why")])
def test_errors_come_out_as_they_went_in(error: HkvError) -> None:
    code, details = status_of(error)
    back = error_of(FakeRpcError(code, details))
    assert type(back) is type(error)
    assert str(back) == "why"


def test_a_failed_request_keeps_the_id_that_is_in_the_log() -> None:
    assert status_of(InternalError("1a2b")) == (grpc.StatusCode.INTERNAL, "internal error 1a2b")
    assert error_of(FakeRpcError(grpc.StatusCode.INTERNAL, "internal error 1a2b")) is None


class FakeRpcError(grpc.RpcError):  # type: ignore[misc]
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details
