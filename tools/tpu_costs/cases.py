"""What can be measured: the geometry of an attention layer on one chip, and a kernel with the load it is given.

Owns: the named shapes. Must never: import jax; a case crosses to the process that compiles it as JSON.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

LANES = 128
CHUNK = 2048
"""New tokens of a sequence in a prefill, unless told otherwise."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """One attention layer as one chip sees it; ``window`` in tokens, ``None``: global."""

    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    sinks: bool = False
    dtype: str = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes of one element of K and V."""
        return {"bfloat16": 2, "float32": 4, "int8": 1}[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer, without padding; int8 with its scales (one word a plane row)."""
        values = 2 * self.kv_heads * self.head_dim * self.itemsize
        if self.dtype != "int8":
            return values
        planes = self.kv_heads * (1 if 2 * self.head_dim <= LANES else 2 * -(-self.head_dim // LANES))
        return values + 4 * planes

    @property
    def query_bytes(self) -> int:
        """Bytes of the query of one token, and of its output: 16-bit whatever the KV dtype, but float32 with it."""
        return self.q_heads * self.head_dim * max(2, self.itemsize)


SHAPES = {
    "gemma-3-27b-tp8": Geometry(4, 2, 128, 1024),
    "gemma-3-1b": Geometry(4, 1, 256, 512),
    "gpt-oss-20b": Geometry(64, 8, 64, 128, sinks=True),
    "gpt-oss-120b-tp8": Geometry(8, 1, 64, 128, sinks=True),
    "gemma-4-31b-local": Geometry(32, 16, 256, 1024),
    "gemma-4-31b-global": Geometry(32, 4, 512),
    "llama-3.1-8b": Geometry(32, 8, 128),
}
"""By the names of models and of the tensor parallelism that gives each chip these heads."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel and its load.

    ``kernel`` is one of ``our_kernels`` or ``jax_kernels``; ``block_size`` tokens a page; ``context`` tokens that each
    sequence has, the mean over a block added; ``batch`` sequences; ``chunk`` new tokens of each (1: decode);
    ``options`` are the kernel's own.
    """

    kernel: str
    geometry: Geometry
    topology: str
    block_size: int
    context: int = 32768
    batch: int = 64
    chunk: int = 1
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The inverse of ``to_json``."""
        fields = json.loads(text)
        return cls(**(fields | {"geometry": Geometry(**fields["geometry"])}))


def default_block_size(geometry: Geometry) -> int:
    """Tokens a block that the engine would choose for a group of this geometry."""
    from hkv_jax.kvcache.format import PageLayout, default_block_sizes
    from hkv_jax.spec import KVGroupSpec, LayerKind

    kind = LayerKind.GLOBAL if geometry.window is None else LayerKind.SLIDING
    group = KVGroupSpec("group", kind, geometry.window, geometry.kv_heads, geometry.head_dim, (0,))
    return default_block_sizes([group], PageLayout.PLANES, geometry.itemsize)["group"]
