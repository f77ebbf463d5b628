"""A message from outside becomes a prompt and options, or is refused: the one place where the wire is distrusted.

Owns: what a request must look like whatever the model. What depends on the model (the vocabulary, the longest sequence)
is checked where it is submitted. Must never: put prompt text or token ids into a message.
"""

from __future__ import annotations

import dataclasses
import uuid

from hkv_jax.errors import RequestError
from hkv_jax.sampling_params import SamplingParams
from serving import convert
from serving.proto import hkv_inference_pb2 as pb

MAX_REQUEST_ID_BYTES = 128

Prompt = str | tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request that is well formed; ``request_id`` is never empty."""

    request_id: str
    prompt: Prompt
    params: SamplingParams


def check_request(message: pb.GenerateRequest) -> CheckedRequest:
    """The request in a message.

    Raises:
        RequestError: it lacks a prompt, or a value is out of range; the message names field, value and range.
    """
    return CheckedRequest(
        request_id=_request_id(message.request_id),
        prompt=_prompt(message),
        params=convert.sampling_from_wire(message.sampling),
    )


def _request_id(given: str) -> str:
    size = len(given.encode())
    if size > MAX_REQUEST_ID_BYTES:
        raise RequestError(f"request_id has {size} bytes; allowed: at most {MAX_REQUEST_ID_BYTES}")
    if not given.isprintable():
        raise RequestError("request_id has characters that cannot be printed; give printable ones, or none")
    return given or uuid.uuid4().hex


def _prompt(message: pb.GenerateRequest) -> Prompt:
    which = message.WhichOneof("prompt")
    if which is None:
        raise RequestError("prompt is missing; set text or token_ids")
    if which == "text":
        return message.text
    if not message.token_ids.ids:
        raise RequestError("token_ids is empty; give at least one id")
    return tuple(message.token_ids.ids)
