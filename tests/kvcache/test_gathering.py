"""Blocks that move while slabs are emptied: what the host's tables and the device are told."""

from __future__ import annotations

import pytest

from hkv_jax.kvcache.layout import plan_layout
from hkv_jax.kvcache.manager import CacheManager
from hkv_jax.testing.cache_layouts import tiny_layout_request


def test_a_block_that_moves_twice_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CacheManager(plan_layout(tiny_layout_request()), 2)
    cache.open(0)
    assert cache.extend(0, 0, 16)
    group = cache.layout.groups[0]
    first, other = cache._groups[0].tables[0].ids
    # A slab is emptied, and then the one that its block went to.
    moves = [(0, first, 40), (0, other, 41), (0, 40, 42)]
    monkeypatch.setattr(cache._boundary, "gather", lambda: moves)
    copies, lanes = cache.gather()
    assert cache._groups[0].tables[0].ids == [42, 41]
    assert sorted(copies) == [(0, group.page(first), group.page(42)), (0, group.page(other), group.page(41))]
    assert lanes == [0]
    assert cache.table_row(0, 0)[:2].tolist() == [group.page(42), group.page(41)]
