"""Quantised K/V: how far from the floats, and where scales lie."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_inputs import check_decode
from pallas_kernels.decode_reference import decode_reference
from pallas_kernels.pages import AttentionShape, PageGeometry
from pallas_kernels.reference_pages import floats_of_tokens
from pallas_kernels.scales import ScaledArena, in_every_slot, quantise, word_rows
from tests.pallas_kernels.decode_cases import DecodeCase

OF_OWN_PLANES = PageGeometry(32, 2, 128, 128)
OF_SHARED_PLANES = PageGeometry(64, 2, 64, 64)
WIDE = PageGeometry(32, 2, 192, 96)


@pytest.mark.parametrize("pages", [OF_OWN_PLANES, OF_SHARED_PLANES, WIDE], ids=["own", "shared", "wide"])
def test_elements_are_off_by_half_a_step(pages: PageGeometry) -> None:
    rng = np.random.default_rng(0)
    parts = [
        (rng.standard_normal((50, pages.num_kv_heads, dim)) * np.exp(rng.uniform(-9, 9, (50, 2, 1)))).astype(np.float32)
        for dim in (pages.key_dim, pages.value_dim)
    ]
    rounded = quantise(jnp.asarray(parts[0]), jnp.asarray(parts[1]), pages)
    assert rounded.words is not None
    assert rounded.words.shape == (50, pages.num_planes)
    for part, back in zip(parts, floats_of_tokens(*rounded, pages), strict=True):
        largest = np.abs(part).max(axis=-1, keepdims=True)
        # Half of a step; a scale that is a bfloat16 is itself off by as much as 2^-8, one way or the other.
        bound = 0.5 / 127 * (1.0 + 2**-8 if pages.shares_plane else 1.0001)
        assert (np.abs(np.asarray(back) - part) <= bound * largest).all()


def test_a_row_of_zeros_stays_zero() -> None:
    zeros = jnp.zeros((3, 2, 128))
    # What an integer becomes of a NaN is the platform's choice.
    with jax.debug_nans(True):
        rounded = quantise(zeros, zeros + 1.0, OF_OWN_PLANES)
    keys, values = floats_of_tokens(*rounded, OF_OWN_PLANES)
    assert not np.asarray(keys).any()
    np.testing.assert_allclose(values, 1.0, rtol=1e-6)


def test_a_number_that_is_none_is_not_hidden() -> None:
    keys = jnp.ones((1, 2, 128)).at[0, 1, 5].set(jnp.nan)
    back, _ = floats_of_tokens(*quantise(keys, keys, OF_OWN_PLANES), OF_OWN_PLANES)
    assert np.isnan(np.asarray(back)[0, 1]).all()
    assert (np.asarray(back)[0, 0] == 1).all()


def test_words_of_a_page_are_plane_by_plane() -> None:
    words = jnp.arange(4, dtype=jnp.int32)[None]
    page = in_every_slot(words, OF_OWN_PLANES)
    assert page.shape == (1, 1, 128)
    assert page[0, 0].tolist() == [plane for plane in range(4) for _ in range(32)]


def test_scales_of_half_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="1 planes of 32 tokens has 32 scales, not whole rows of 128"):
        word_rows(PageGeometry(32, 1, 64, 64))


def test_integers_without_scales_are_refused() -> None:
    shape = AttentionShape(OF_OWN_PLANES, 4, 64, 0.1)
    inputs = DecodeCase(shape, (3, 40), "int8").inputs()
    check_decode(shape, inputs)
    assert isinstance(inputs.arena, ScaledArena)
    for change in ({"words": None}, {"arena": inputs.arena.values}):
        with pytest.raises(ValueError, match="keys are int8: words of the new tokens"):
            check_decode(shape, inputs._replace(**change))


@pytest.mark.parametrize("pages", [OF_OWN_PLANES, OF_SHARED_PLANES], ids=["own", "shared"])
def test_attention_over_integers_is_near_that_over_floats(pages: PageGeometry) -> None:
    """The same numbers in both pools: outputs are averages of values, so off by little more than one of them."""
    shape = AttentionShape(pages, 8, None, pages.key_dim**-0.5)
    positions = (0, 30, 63, 200)
    outputs = [
        np.asarray(decode_reference(shape, DecodeCase(shape, positions, dtype).inputs())[0])
        for dtype in ("float32", "int8")
    ]
    assert 1e-4 < np.abs(outputs[0] - outputs[1]).max() < 0.05
