"""Plain data of the core becomes messages of the wire, and back; nothing is decided here.

Owns: the correspondence of fields. Must never: check ranges (the types of the core do), or import jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from hkv_jax.engine.prefix_stats import PrefixStats
from hkv_jax.outputs import Completion, FinishReason, PrefixHit, RequestOutput, StreamDelta, TokenLogprob, Usage
from hkv_jax.sampling_params import SamplingParams
from serving.info import PoolInfo, ServerInfo
from serving.proto import hkv_inference_pb2 as pb

_REASON_TO_WIRE = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}
_REASON_FROM_WIRE = {wire: reason for reason, wire in _REASON_TO_WIRE.items()}
_HIT_TO_WIRE = {
    PrefixHit.MISS: pb.PREFIX_HIT_MISS,
    PrefixHit.RESIDENT: pb.PREFIX_HIT_RESIDENT,
    PrefixHit.TRUNCATE: pb.PREFIX_HIT_TRUNCATE,
    PrefixHit.REBUILD: pb.PREFIX_HIT_REBUILD,
}
_HIT_FROM_WIRE = {wire: hit for hit, wire in _HIT_TO_WIRE.items()}


def sampling_from_wire(message: pb.SamplingParams) -> SamplingParams:
    """The options of a request; what the message does not set stays unset.

    Raises:
        RequestError: a value is out of range.
    """
    values: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    for name, convert in _CONTAINERS.items():
        if name in values:
            values[name] = convert(values[name])
    return SamplingParams(**values)


def sampling_to_wire(params: SamplingParams) -> pb.SamplingParams:
    """A message with exactly the options that are set; ``None`` is as good as unset."""
    values = {name: getattr(params, name) for name in params.set_fields}
    return pb.SamplingParams(**{name: value for name, value in values.items() if value is not None})


def output_to_wire(output: RequestOutput) -> pb.GenerateResponse:
    """Everything that came back for one prompt."""
    return pb.GenerateResponse(
        request_id=output.request_id,
        outputs=map(completion_to_wire, output.outputs),
        prompt_logprobs=logprobs_to_wire(output.prompt_logprobs),
        usage=usage_to_wire(output.usage),
    )


def completion_to_wire(completion: Completion) -> pb.Completion:
    """A completion, or what is new of one."""
    message = pb.Completion(
        sample=completion.sample,
        text=completion.text,
        token_ids=completion.token_ids,
        logprobs=logprobs_to_wire(completion.logprobs),
        finish_reason=_REASON_TO_WIRE[completion.finish_reason],
    )
    if isinstance(completion.stop_reason, str):
        message.stop_string = completion.stop_reason
    elif completion.stop_reason is not None:
        message.stop_token_id = completion.stop_reason
    return message


def completion_from_wire(message: pb.Completion) -> Completion:
    """The inverse; logprobs that are not there are ``None``."""
    which = message.WhichOneof("stop_reason")
    return Completion(
        sample=message.sample,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=logprobs_from_wire(message.logprobs),
        finish_reason=_REASON_FROM_WIRE[message.finish_reason],
        stop_reason=getattr(message, which) if which is not None else None,
    )


def delta_to_wire(delta: StreamDelta) -> pb.GenerateChunk:
    """One message of a stream."""
    return pb.GenerateChunk(
        request_id=delta.request_id,
        delta=completion_to_wire(delta.completion),
        prompt_logprobs=logprobs_to_wire(delta.prompt_logprobs),
        usage=usage_to_wire(delta.usage) if delta.usage is not None else None,
    )


def delta_from_wire(message: pb.GenerateChunk) -> StreamDelta:
    """The inverse."""
    return StreamDelta(
        request_id=message.request_id,
        completion=completion_from_wire(message.delta),
        prompt_logprobs=logprobs_from_wire(message.prompt_logprobs),
        usage=usage_from_wire(message.usage) if message.HasField("usage") else None,
    )


def logprobs_to_wire(entries: Iterable[TokenLogprob] | None) -> list[pb.TokenLogprobs]:
    """One message a token."""
    return [
        pb.TokenLogprobs(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=[pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top],
        )
        for entry in entries or ()
    ]


def logprobs_from_wire(messages: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprob, ...] | None:
    """The inverse; none at all is ``None``."""
    entries = tuple(
        TokenLogprob(
            message.token_id,
            message.logprob if message.HasField("logprob") else None,
            tuple((top.token_id, top.logprob) for top in message.top),
        )
        for message in messages
    )
    return entries or None


def usage_to_wire(usage: Usage) -> pb.Usage:
    """Token counts, and how a cached prefix served."""
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        prefix_hit=_HIT_TO_WIRE[usage.prefix_hit],
        rebuilt_tokens=usage.rebuilt_tokens,
    )


def usage_from_wire(message: pb.Usage) -> Usage:
    """The inverse; a server that does not say how a prefix served, had none."""
    return Usage(
        message.prompt_tokens,
        message.completion_tokens,
        message.cached_tokens,
        _HIT_FROM_WIRE.get(message.prefix_hit, PrefixHit.MISS),
        message.rebuilt_tokens,
    )


def info_to_wire(info: ServerInfo) -> pb.GetServerInfoResponse:
    """What the server says about itself."""
    return pb.GetServerInfoResponse(
        kv_cache=pb.KVCacheInfo(
            pools=[pb.KVPool(**dataclasses.asdict(pool)) for pool in info.pools],
            all_global_peak_bytes=info.all_global_peak_bytes,
            slabs_moved=info.slabs_moved,
            copied_bytes=info.copied_bytes,
        ),
        prefix_cache=pb.PrefixCacheInfo(
            hits=pb.PrefixHitCounts(**{str(hit): count for hit, count in info.prefix.hits.items()}),
            **{name: getattr(info.prefix, name) for name in _PREFIX_SCALARS},
        ),
        **{name: getattr(info, name) for name in _INFO_SCALARS},
    )


def info_from_wire(message: pb.GetServerInfoResponse) -> ServerInfo:
    """The inverse."""
    cache, prefix = message.kv_cache, message.prefix_cache
    names = [field.name for field in dataclasses.fields(PoolInfo)]
    return ServerInfo(
        pools=tuple(PoolInfo(**{name: getattr(pool, name) for name in names}) for pool in cache.pools),
        all_global_peak_bytes=cache.all_global_peak_bytes if cache.HasField("all_global_peak_bytes") else None,
        prefix=PrefixStats(
            hits={hit: getattr(prefix.hits, hit) for hit in PrefixHit},
            **{name: getattr(prefix, name) for name in _PREFIX_SCALARS},
        ),
        slabs_moved=cache.slabs_moved,
        copied_bytes=cache.copied_bytes,
        **{name: getattr(message, name) for name in _INFO_SCALARS},
    )


_CONTAINERS: dict[str, Callable[[Any], Any]] = {"stop": tuple, "stop_token_ids": tuple, "logit_bias": dict}
_PREFIX_SCALARS = tuple(field.name for field in dataclasses.fields(PrefixStats) if field.name != "hits")
_INFO_SCALARS = (
    *("version", "model", "max_model_len", "vocab_size"),
    *("max_num_seqs", "running_sequences", "waiting_sequences"),
)
