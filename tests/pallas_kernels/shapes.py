"""The attention shapes of the kernel tests: blocks are small, so that few tokens have many edges."""

from __future__ import annotations

from pallas_kernels.pages import AttentionShape, PageGeometry

BLOCK = 16


def shape_of(
    heads: tuple[int, int], dims: tuple[int, int], window: int | None = None, soft_cap: float | None = None
) -> AttentionShape:
    """Heads (query, kv) and dims (key, value)."""
    return AttentionShape(PageGeometry(BLOCK, heads[1], *dims), heads[0], window, dims[0] ** -0.5, soft_cap)
