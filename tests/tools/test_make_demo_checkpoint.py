"""The random demo checkpoint is one the runtime can read, and the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from hkv_jax.families import read_model_spec
from hkv_jax.spec import LayerKind
from tools.make_demo_checkpoint import VOCAB_SIZE, WINDOW, WORDS, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "model"
    write(folder)
    return folder


def test_it_is_a_hybrid_model_the_runtime_reads(folder: Path) -> None:
    spec = read_model_spec(folder)
    kinds = [layer.kind for layer in spec.layers]
    assert kinds == ([LayerKind.SLIDING] * 5 + [LayerKind.GLOBAL]) * 2
    assert {group.name: group.window for group in spec.kv_groups()} == {"global": None, "sliding": WINDOW}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert set(spec.eos_token_ids) == {tokenizer.token_to_id(name) for name in ("<eos>", "<end_of_turn>")}
    assert tokenizer.get_vocab_size() <= spec.vocab_size == VOCAB_SIZE


def test_every_weight_is_bf16_and_finite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert {str(value.dtype) for value in tensors.values()} == {"bfloat16"}
    assert all(np.isfinite(value.astype(np.float32)).all() for value in tensors.values())
    assert 0.5e6 < sum(value.size for value in tensors.values()) < 1.6e6


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write(tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if (folder / name).read_bytes() != (tmp_path / name).read_bytes()] == []
    write(tmp_path, seed=1)
    assert (folder / "model.safetensors").read_bytes() != (tmp_path / "model.safetensors").read_bytes()


def test_the_tokenizer_spells_anything_and_knows_its_words(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Once, near the river:  Übung 你好\n\ttwo 🙂 <b>"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    sentence = " " + " ".join(WORDS)
    assert len(tokenizer.encode(sentence, add_special_tokens=False).ids) == len(WORDS)
