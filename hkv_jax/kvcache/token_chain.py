"""What identifies a prefix: digests of a sequence's tokens, one for each full block of the largest size.

Owns: the digests and their root. Must never: know where the tokens' K/V lies.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

ROOT = hashlib.sha256(b"hkv-jax prefix chain, version 1").digest()
"""The parent of a chain's first digest. An index serves one model and one KV format, so neither is part of it."""


class TokenChain:
    """Digest i is SHA-256 over digest i - 1 and the tokens ``[i P, (i + 1) P)`` as little-endian u32.

    Equal digests therefore mean equal tokens from position 0 on, whatever else differs.
    """

    __slots__ = ("block_size", "digests")

    def __init__(self, block_size: int) -> None:
        """An empty chain over blocks of ``block_size`` P tokens."""
        self.block_size = block_size
        self.digests: list[bytes] = []

    @property
    def num_tokens(self) -> int:
        """Tokens the digests cover, a multiple of P."""
        return len(self.digests) * self.block_size

    def append(self, tokens: NDArray[np.int32]) -> None:
        """Adds the digests of ``tokens``, which follow those covered so far; what fills no block is ignored."""
        data = tokens.astype("<u4", copy=False).tobytes()
        width = 4 * self.block_size
        digests = self.digests
        digest = digests[-1] if digests else ROOT
        sha256 = hashlib.sha256
        for begin in range(0, len(data) - width + 1, width):
            digest = sha256(digest + data[begin : begin + width]).digest()
            digests.append(digest)
