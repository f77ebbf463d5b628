"""What makes a real model's folder: the joined file is checked, and the hybrid config is one the runtime reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from hkv_jax.families import read_model_spec
from tools.make_real_models import SOURCES, hybrid_config, is_made, join, make_hybrid

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


def test_the_hybrid_differs_from_the_original_in_its_layers_only(tmp_path: Path) -> None:
    original = tmp_path / "plain"
    original.mkdir()
    (original / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    (original / "model.safetensors").write_bytes(b"weights")
    make_hybrid(original, tmp_path / "hybrid")
    assert (tmp_path / "hybrid" / "model.safetensors").read_bytes() == b"weights"
    plain, hybrid = read_model_spec(original), read_model_spec(tmp_path / "hybrid")
    assert [layer.window for layer in hybrid.layers] == ([256, 256, 256, None] * 8)[:30]
    same = dataclasses.replace(hybrid, architecture=plain.architecture, layers=plain.layers)
    assert same == plain
    assert [layer.rope for layer in hybrid.layers] == [layer.rope for layer in plain.layers]


def test_the_original_config_is_left_alone() -> None:
    before = json.dumps(LLAMA)
    hybrid_config(LLAMA)
    assert json.dumps(LLAMA) == before


def test_a_file_that_is_not_the_expected_one_is_refused(tmp_path: Path) -> None:
    source = dataclasses.replace(
        SOURCES["gemma-3-270m"],
        chunks=("one/*.part0", "two/*.part1"),
        sha256=hashlib.sha256(b"first second").hexdigest(),
    )
    for folder, name, data in (("one", "x.part0", b"first "), ("two", "x.part1", b"second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(data)
    join(tmp_path, source, tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == b"first second"
    (tmp_path / "two" / "x.part1").write_bytes(b"secund")
    with pytest.raises(SystemExit, match="sha256"):
        join(tmp_path, source, tmp_path / "joined")
    (tmp_path / "two" / "x.part1").unlink()
    with pytest.raises(SystemExit, match=r"hold 0 files two/\*\.part1"):
        join(tmp_path, source, tmp_path / "joined")


def test_a_folder_without_a_config_is_not_made(tmp_path: Path) -> None:
    assert not is_made(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert is_made(tmp_path)
