"""Digests say which tokens came before, and nothing else."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest

from hkv_jax.kvcache.token_chain import ROOT, TokenChain


def chain_of(tokens: list[int], block_size: int = 4) -> TokenChain:
    chain = TokenChain(block_size)
    chain.append(np.array(tokens, np.int32))
    return chain


def test_a_digest_is_of_the_one_before_and_of_a_block_of_tokens() -> None:
    tokens = [7, 2**31 - 1, 0, 5, 256, 1, 2, 3]
    first = hashlib.sha256(ROOT + struct.pack("<4I", *tokens[:4])).digest()
    second = hashlib.sha256(first + struct.pack("<4I", *tokens[4:])).digest()
    assert chain_of(tokens).digests == [first, second]


@pytest.mark.parametrize("cuts", [(8,), (4, 16), (0, 20), (12, 12, 16)])
def test_pieces_give_what_the_whole_gives(cuts: tuple[int, ...]) -> None:
    tokens = np.arange(23, dtype=np.int32)
    chain, begin = TokenChain(4), 0
    for cut in (*cuts, 23):
        chain.append(tokens[begin:cut])
        begin = cut
    assert chain.digests == chain_of(tokens.tolist()).digests
    assert chain.num_tokens == 20


def test_tokens_that_fill_no_block_are_left_out() -> None:
    assert chain_of([1, 2, 3]).digests == []
    chain = chain_of([1, 2, 3, 4, 5])
    assert chain.num_tokens == 4
    assert chain.digests == chain_of([1, 2, 3, 4, 9]).digests


def test_whatever_differs_before_a_block_makes_its_digest_another() -> None:
    same, other = chain_of([1, 2, 3, 4, 5, 6, 7, 8]), chain_of([1, 2, 3, 9, 5, 6, 7, 8])
    assert set(same.digests).isdisjoint(other.digests)
    moved = chain_of([1, 2, 3, 4, 1, 2, 3, 4])
    assert moved.digests[0] == same.digests[0]
    assert moved.digests[0] != moved.digests[1]


def test_tokens_of_another_width_are_the_same_tokens() -> None:
    tokens = np.arange(8)
    wide, narrow = TokenChain(4), TokenChain(4)
    wide.append(tokens.astype(np.int64))
    narrow.append(tokens.astype(np.int32))
    assert wide.digests == narrow.digests
