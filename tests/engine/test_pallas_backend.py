"""The whole engine on the kernels, interpreted on a CPU: greedy tokens are those of the XLA backend."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from hkv_jax.engine.request import Request
from hkv_jax.kvcache.format import PageLayout
from hkv_jax.sampling_params import SamplingParams
from tests.engine.tiny_model import VOCAB, TinyModel, tiny_engine

pytestmark = pytest.mark.slow

NUM_TOKENS = 4

PROMPT_LENGTHS = {
    "float32": (1, 150, 16, 31, 33, 48, 63, 65, 127),
    "bfloat16": (1, 150, 2, 15, 17, 32, 47, 49, 64, 128, 149),
}
"""Around the sizes of chunks, blocks and windows; between the two dtypes of a head dim, every one."""


def greedy_tokens(
    folder: Path, backend: str, lengths: tuple[int, ...], **options: object
) -> tuple[dict[str, list[int]], PageLayout]:
    """Tokens by request of prompts of these lengths, run together, and the layout of the pages."""
    parts = tiny_engine(folder, attention_backend=backend, max_num_seqs=2, kv_cache_memory=32 * 2**20, **options)
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    tokens: dict[str, list[int]] = {}
    for length in lengths:
        tokens[str(length)] = []
        parts.engine.add(Request.create(str(length), rng.integers(3, VOCAB, length).tolist(), params))
    while parts.engine.has_work:
        for event in parts.engine.step():
            tokens[event.sequence.request.request_id].append(event.token_id)
    return tokens, parts.layout.groups[0].format.layout


@pytest.mark.parametrize(
    ("model", "devices"),
    [
        (TinyModel(64, 2, 64, "float32"), 1),
        (TinyModel(64, 1, 48, "bfloat16"), 1),
        (TinyModel(128, 2, 48, "float32"), 2),
        (TinyModel(128, 1, 16, "bfloat16"), 1),
        (TinyModel(256, 2, 48, "float32"), 1),
        (TinyModel(256, 1, 32, "bfloat16"), 1),
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_xla(
    model: TinyModel, devices: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model.write(tmp_path)
    lengths = PROMPT_LENGTHS[model.dtype]
    expected, _ = greedy_tokens(folder, "auto", lengths)
    assert {len(tokens) for tokens in expected.values()} == {NUM_TOKENS}
    distinct = {token for tokens in expected.values() for token in tokens}
    assert len(distinct) >= 10, "tokens that repeat would be the same whatever attention gives"
    with caplog.at_level(logging.WARNING):
        found, page_layout = greedy_tokens(folder, "pallas", lengths, tensor_parallel_size=devices)
    assert found == expected
    assert page_layout is PageLayout.PLANES
    assert "interpreted" in caplog.text
