"""Token ids of a trace's segments: a pure function of segment id and position.

Owns: that function. Must never: keep state; whoever asks for the same tokens gets the same ids.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from tools.cache_simulation.trace import OUTPUT_PREFIX, TraceRequest

VOCAB_SIZE = 2**31 - 1
"""As large as ids can be, so that two segments do not begin alike by chance."""


def segment_ids(segment_id: str, length: int) -> NDArray[np.int32]:
    """The first ``length`` ids of a segment, i32 below ``VOCAB_SIZE``.

    Position i has the i-th output of SplitMix64 (Steele, Lea and Flood, 2014) seeded with a hash of the segment's name.
    """
    seed = int.from_bytes(hashlib.blake2b(segment_id.encode(), digest_size=8).digest(), "little")
    state = np.uint64(seed) + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return (state % np.uint64(VOCAB_SIZE)).astype(np.int32)


def prompt_ids(request: TraceRequest) -> NDArray[np.int32]:
    """The prompt of a request."""
    return np.concatenate([segment_ids(segment_id, length) for segment_id, length in request.segments])


def output_ids(request: TraceRequest) -> NDArray[np.int32]:
    """The output of a request, which a later turn finds as the segment ``out:<id>``."""
    return segment_ids(OUTPUT_PREFIX + request.request_id, request.output_len)
