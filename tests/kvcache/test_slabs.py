"""Who owns a slab: one group or nobody, and never below a reserve."""

from __future__ import annotations

import pytest

from hkv_jax.kvcache.slabs import SlabMap


def make() -> SlabMap:
    return SlabMap(5, {0: (0, 1), 1: (2, 3, 4)}, {0: 1, 1: 3})


def test_a_slab_is_handed_over_once() -> None:
    slabs = make()
    slabs.take(1, 0)
    assert (slabs.slabs_of(0), slabs.slabs_of(1)) == ((0,), (2, 3, 4))
    slabs.check_invariants()
    slabs.give(1, 1)
    slabs.check_invariants()
    assert (slabs.slabs_of(0), slabs.slabs_of(1)) == ((0,), (1, 2, 3, 4))
    assert slabs.num_slabs == 5


def test_the_reserve_stays() -> None:
    slabs = make()
    assert slabs.can_take(0)
    assert not slabs.can_take(1)
    with pytest.raises(ValueError, match="group 1 is at its reserve of 3 slabs"):
        slabs.take(2, 1)


def test_misuse_is_refused() -> None:
    slabs = make()
    with pytest.raises(ValueError, match="slab 2 belongs to group 1"):
        slabs.take(2, 0)
    with pytest.raises(ValueError, match="slab 2 already belongs to group 1"):
        slabs.give(2, 0)
    with pytest.raises(ValueError, match="slab 5 is not one of 5"):
        slabs.give(5, 0)
    with pytest.raises(ValueError, match="slab 1 already belongs"):
        SlabMap(2, {0: (0, 1), 1: (1,)}, {0: 0, 1: 0})


def test_a_lost_reserve_is_noticed() -> None:
    slabs = SlabMap(3, {0: (0,)}, {0: 2})
    with pytest.raises(AssertionError, match="below its reserve"):
        slabs.check_invariants()
