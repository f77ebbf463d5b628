"""Errors become gRPC status codes, and back.

Owns: the table, and what a client may learn of an unexpected error: an id, nothing else. Must never: know requests.
"""

from __future__ import annotations

import logging
import secrets

import grpc

from hkv_jax.errors import EngineStoppedError, HkvError, InternalError, OverloadedError, RequestError

logger = logging.getLogger(__name__)

_CODES: tuple[tuple[type[HkvError], grpc.StatusCode], ...] = (
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (EngineStoppedError, grpc.StatusCode.UNAVAILABLE),
)


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status code and the message for a client; an error nobody meant to raise is logged under a new id."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, str(error)
    if isinstance(error, InternalError):  # logged where it happened
        return grpc.StatusCode.INTERNAL, str(error)
    error_id = secrets.token_hex(4)
    logger.error("internal error %s", error_id, exc_info=error)
    return grpc.StatusCode.INTERNAL, f"internal error {error_id}"


def error_of(error: grpc.RpcError) -> HkvError | None:
    """The exception a status stands for; ``None`` for one that hkv-jax does not raise (a deadline, a cancellation)."""
    for kind, code in _CODES:
        if error.code() == code:
            return kind(error.details() or code.name)
    return None
