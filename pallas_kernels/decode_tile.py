"""What the static plans of the decode kernels have in common.

Owns: ``DecodeTile``. Must never: choose sizes (``tiles`` does), or know how a kernel loops.

Axis letters: P token slots of a block.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pallas_kernels.heads import HeadLayout
from pallas_kernels.pages import LANES, AttentionShape
from pallas_kernels.scales import buffer_rows, is_scaled, word_rows
from pallas_kernels.vector_memory import VectorBuffer


@dataclasses.dataclass(frozen=True)
class DecodeTile:
    """The static plan of a decode.

    Attributes:
        heads: the attention and its order of heads.
        kv_dtype: of the pool.
        query_dtype: of the queries.
        write_rows: rows of a plane that are written back for one new token. Kept here, because it depends on the mesh
            of the trace, and the body of a kernel is traced under another.
    """

    heads: HeadLayout
    kv_dtype: jnp.dtype
    query_dtype: jnp.dtype
    write_rows: int

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Of both operands of the products."""
        return jnp.dtype(jnp.promote_types(self.query_dtype, self.kv_dtype))

    @property
    def shape(self) -> AttentionShape:
        """The attention."""
        return self.heads.shape

    @property
    def scaled(self) -> bool:
        """Whether K/V are integers with scales."""
        return is_scaled(self.kv_dtype)

    @property
    def word_rows(self) -> int:
        """R, rows of scales of a page of integers."""
        return word_rows(self.shape.pages)

    @property
    def pool_arrays(self) -> int:
        """Arrays that the pool is made of: pages, and words where they have scales."""
        return 2 if self.scaled else 1

    @property
    def block(self) -> int:
        """P."""
        return self.shape.pages.block_size

    def block_buffers(self, count: int, num_blocks: int) -> list[VectorBuffer]:
        """``count`` times ``num_blocks`` blocks of planes; of integers, their scales as well."""
        pages = self.shape.pages
        buffers = [VectorBuffer((count, pages.num_planes, num_blocks * self.block, LANES), self.kv_dtype)]
        if self.scaled:
            buffers.append(VectorBuffer((count, buffer_rows(pages, num_blocks), LANES), jnp.dtype(jnp.int32)))
        return buffers

    def write_buffers(self, count: int) -> list[VectorBuffer]:
        """``count`` times the rows that one new token writes; of integers, the scales of its block as well."""
        buffers = [VectorBuffer((count, self.shape.pages.num_planes, self.write_rows, LANES), self.kv_dtype)]
        if self.scaled:
            buffers.append(VectorBuffer((count, self.word_rows, LANES), jnp.dtype(jnp.int32)))
        return buffers
