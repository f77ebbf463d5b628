"""What the cache sees of a model, from its config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hkv_jax.errors import ConfigError
from tools.cache_simulation.model_geometry import ModelGeometry, read_geometry

MODELS = Path(__file__).resolve().parents[3] / "benchmarks" / "models"
GEMMA4 = {"model_type": "gemma4_text", "num_hidden_layers": 6, "num_key_value_heads": 4, "head_dim": 16}


def shapes(geometry: ModelGeometry) -> list[tuple[str, int | None, int, int, int]]:
    """(name, window, kv heads, head dim, layers) of each group."""
    return [(g.name, g.window, g.num_kv_heads, g.head_dim, g.num_layers) for g in geometry.groups()]


def read(folder: Path, **config: Any) -> ModelGeometry:
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return read_geometry(path)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("gemma3-270m", [("global", None, 1, 256, 3), ("sliding", 512, 1, 256, 15)]),
        ("gemma3-1b", [("global", None, 1, 256, 4), ("sliding", 512, 1, 256, 22)]),
        ("gemma3-27b", [("global", None, 16, 128, 10), ("sliding", 1024, 16, 128, 52)]),
        ("gemma4-31b", [("global", None, 4, 512, 10), ("sliding", 1024, 16, 256, 50)]),
        ("gpt-oss-20b", [("global", None, 8, 64, 12), ("sliding", 128, 8, 64, 12)]),
        ("gpt-oss-120b", [("global", None, 8, 64, 18), ("sliding", 128, 8, 64, 18)]),
        ("llama-3.1-8b", [("global", None, 8, 128, 32)]),
    ],
)
def test_the_models_of_the_benchmark(model: str, expected: list[tuple[str, int | None, int, int, int]]) -> None:
    assert shapes(read_geometry(MODELS / f"{model}.json")) == expected


def test_a_model_without_windows_keeps_everything() -> None:
    assert shapes(read_geometry(MODELS / "gemma3-27b.json").all_global()) == [("global", None, 16, 128, 62)]
    both = shapes(read_geometry(MODELS / "gemma4-31b.json").all_global())
    assert [(window, heads, dim, layers) for _, window, heads, dim, layers in both] == [
        (None, 16, 256, 50),
        (None, 4, 512, 10),
    ]


def test_absent_fields_have_the_defaults_of_the_family(tmp_path: Path) -> None:
    assert shapes(read(tmp_path, model_type="gpt_oss")) == [("global", None, 8, 64, 18), ("sliding", 128, 8, 64, 18)]
    gemma4 = read(tmp_path, model_type="gemma4_text")
    assert shapes(gemma4) == [("global", None, 4, 512, 5), ("sliding", 512, 4, 256, 25)]
    assert gemma4.max_position == 131_072


def test_the_last_layer_is_global_whatever_the_count(tmp_path: Path) -> None:
    geometry = read(tmp_path, **{**GEMMA4, "num_hidden_layers": 8})
    assert [layer.window is None for layer in geometry.layers] == [False] * 5 + [True, False, True]


def test_global_layers_may_have_heads_of_their_own(tmp_path: Path) -> None:
    geometry = read(tmp_path, **GEMMA4, num_global_key_value_heads=2, global_head_dim=32, sliding_window=8)
    assert shapes(geometry) == [("global", None, 2, 32, 1), ("sliding", 8, 4, 16, 5)]
    plain = read(tmp_path, **GEMMA4, num_global_key_value_heads=None, global_head_dim=None, sliding_window=8)
    assert shapes(plain) == [("global", None, 4, 16, 1), ("sliding", 8, 4, 16, 5)]


def test_layers_that_borrow_their_kv_keep_none(tmp_path: Path) -> None:
    geometry = read(tmp_path, **GEMMA4, num_kv_shared_layers=4, layer_types=["full_attention", "sliding_attention"] * 3)
    assert [layer.window for layer in geometry.layers] == [None, 512]
    with pytest.raises(ConfigError, match="num_kv_shared_layers is 6"):
        read(tmp_path, **GEMMA4, num_kv_shared_layers=6)


def test_the_text_part_of_a_larger_model_and_the_folder_of_a_model_do(tmp_path: Path) -> None:
    expected = read(tmp_path, **GEMMA4)
    assert read(tmp_path, model_type="gemma4", text_config=GEMMA4, vision_config={"patch_size": 14}) == expected
    assert read_geometry(tmp_path) == expected


def test_quantised_weights_do_not_matter(tmp_path: Path) -> None:
    config = json.loads((MODELS / "gemma3-270m.json").read_text(encoding="utf-8"))
    geometry = read(tmp_path, **config, quantization_config={"quant_method": "mxfp4"})
    assert geometry == read_geometry(MODELS / "gemma3-270m.json")


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_type is 'mamba'; accepted: .*gemma4_text, .*gpt_oss"):
        read(tmp_path, model_type="mamba")
    with pytest.raises(ConfigError, match=r"layer_types is .*; accepted: 2 times"):
        read(tmp_path, model_type="gpt_oss", num_hidden_layers=2, layer_types=["full_attention", "linear"])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_geometry(tmp_path / "missing.json")
