"""Engine options: names, defaults, TOML, the environment variable, and options that contradict each other."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from hkv_jax.config import DEMO_MODEL, EngineConfig, engine_options
from hkv_jax.errors import ConfigError
from hkv_jax.spec import KVGroupSpec, LayerKind

VARIABLE = "EXPECTED_AVERAGE_SEQ_LENGTH"

# Names and defaults that users rely on.
DEFAULTS: dict[str, Any] = {
    "model": DEMO_MODEL,
    "dtype": "auto",
    "kv_cache_dtype": "auto",
    "max_model_len": None,
    "max_num_seqs": None,
    "max_num_batched_tokens": None,
    "max_prefill_chunk": None,
    "block_size": None,
    "kv_cache_memory": None,
    "kv_cache_memory_fraction": None,
    "kv_partition": "moving",
    "expected_average_seq_length": None,
    "enable_prefix_caching": True,
    "tail_repair": "exact",
    "max_bypass_seconds": 30.0,
    "max_prefix_wait_seconds": 30.0,
    "tensor_parallel_size": 1,
    "attention_backend": "auto",
    "generation_config": "model",
}
BAD_VALUES = [0, -5, "abc", 1e3, "", "0", "-5", "1e3", True]


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def toml(folder: Path, text: str) -> Path:
    path = folder / "engine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults() -> None:
    assert dataclasses.asdict(EngineConfig()) == DEFAULTS
    assert dataclasses.asdict(EngineConfig.from_options(dict.fromkeys(DEFAULTS))) == DEFAULTS


def test_the_table_describes_every_field() -> None:
    options = engine_options()
    assert [option.name for option in options] == list(DEFAULTS)
    for option in options:
        assert option.flag == "--" + option.name.replace("_", "-")
        assert option.help.endswith(".") and option.default_text
        assert option.default == DEFAULTS[option.name]


def test_every_value_is_read_as_it_is_from_a_command_line() -> None:
    config = EngineConfig.from_options(
        {
            "model": "models/x",
            "dtype": "float32",
            "max_model_len": "4096",
            "max_num_seqs": "8",
            "block_size": "global=32,sliding=16",
            "kv_cache_memory": "2GiB",
            "expected_average_seq_length": "900",
            "enable_prefix_caching": "false",
            "max_bypass_seconds": "2.5",
            "max_prefix_wait_seconds": "0",
            "tensor_parallel_size": None,
        }
    )
    assert config == EngineConfig(
        model=Path("models/x"),
        dtype="float32",
        max_model_len=4096,
        max_num_seqs=8,
        block_size={"global": 32, "sliding": 16},
        kv_cache_memory=2**31,
        expected_average_seq_length=900,
        enable_prefix_caching=False,
        max_bypass_seconds=2.5,
        max_prefix_wait_seconds=0.0,
        tensor_parallel_size=1,
    )


COUNTS = [
    *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_prefill_chunk"),
    *("expected_average_seq_length", "tensor_parallel_size", "kv_cache_memory", "block_size"),
]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", BAD_VALUES)
def test_bad_values_say_what_is_accepted(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is {re.escape(repr(value))}; accepted: .*positive integer"):
        EngineConfig.from_options({name: value})


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("enable_prefix_caching", "yes", "true or false"),
        ("tail_repair", "truncate", "exact, off"),
        ("max_bypass_seconds", 0, "a number of seconds above 0, up to 86400, such as 2.5"),
        ("max_prefix_wait_seconds", -1, "a number of seconds above 0, or 0 (never wait), up to 86400, such as 2.5"),
    ],
)
def test_bad_values_of_the_prefix_cache(name: str, value: object, accepted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_options({name: value})
    assert str(caught.value) == f"{name} is {value!r}; accepted: {accepted}"


@pytest.mark.parametrize("value", ["0", "-5", "abc", "1e3", ""])
def test_bad_values_of_the_variable(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=rf"^{VARIABLE} is '{value}'; accepted: a positive integer of tokens"):
        EngineConfig()


def test_the_option_beats_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "700")
    assert EngineConfig().expected_average_seq_length == 700
    assert EngineConfig(expected_average_seq_length=800).expected_average_seq_length == 800
    path = toml(tmp_path, "expected_average_seq_length = 900")
    assert EngineConfig.from_toml(path).expected_average_seq_length == 900
    # Nobody asks for it, so nobody is told that it is wrong.
    monkeypatch.setenv(VARIABLE, "abc")
    assert EngineConfig(expected_average_seq_length=800).expected_average_seq_length == 800


def test_toml(tmp_path: Path) -> None:
    path = toml(
        tmp_path,
        """
        model = "models/gemma"
        dtype = "float32"
        max_model_len = 4096
        kv_cache_memory = "1GiB"
        block_size = { global = 32, sliding = 16 }
        enable_prefix_caching = false
        max_bypass_seconds = 4
        """,
    )
    config = EngineConfig.from_toml(path, {"max_model_len": "2048", "dtype": None, "max_num_seqs": 4})
    assert config == EngineConfig(
        model=Path("models/gemma"),
        dtype="float32",
        max_model_len=2048,
        kv_cache_memory=2**30,
        block_size={"global": 32, "sliding": 16},
        enable_prefix_caching=False,
        max_bypass_seconds=4.0,
        max_num_seqs=4,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_modle_len = 3", r"engine\.toml: no option is called 'max_modle_len'; did you mean max_model_len\?"),
        ("max-model-len = 3", r"did you mean max_model_len\?"),
        ("zzz = 3", "no option is called 'zzz'; options are model, dtype, "),
        ("[engine]\nmax_model_len = 3", "no option is called 'engine'"),
        ("max_model_len = 1e3", "max_model_len is 1000.0; accepted: a positive integer of tokens"),
        ("max_model_len = 3\nmax_model_len = 4", "not valid TOML"),
        ("max_model_len", "not valid TOML"),
        ("x = " + "[" * 5000, "not valid TOML"),
    ],
)
def test_bad_toml(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EngineConfig.from_toml(toml(tmp_path, text))


def test_toml_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        EngineConfig.from_toml(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    with pytest.raises(ConfigError, match="not valid TOML"):
        EngineConfig.from_toml(tmp_path / "latin.toml")
    with pytest.raises(ConfigError, match="too large"):
        EngineConfig.from_toml(toml(tmp_path, "#" * (2**20 + 1)))


def test_unknown_names_in_python() -> None:
    with pytest.raises(ConfigError, match=r"no option is called 'max_len'; did you mean max_model_len\?"):
        EngineConfig.from_options({"max_len": 3})


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"kv_cache_memory": "1GiB", "kv_cache_memory_fraction": 0.5}, ("kv_cache_memory", "kv_cache_memory_fraction")),
        ({"max_num_seqs": 17, "max_num_batched_tokens": 16}, ("max_num_seqs (17)", "max_num_batched_tokens (16)")),
        (
            {"max_prefill_chunk": 17, "max_num_batched_tokens": 16},
            ("max_prefill_chunk (17)", "max_num_batched_tokens (16)"),
        ),
    ],
)
def test_options_that_disagree_are_both_named(options: dict[str, Any], names: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**options)
    assert all(name in str(caught.value) for name in names)


def test_options_may_be_equal() -> None:
    EngineConfig(max_num_seqs=16, max_num_batched_tokens=16, max_prefill_chunk=16)


def groups() -> tuple[KVGroupSpec, ...]:
    return (
        KVGroupSpec("global", LayerKind.GLOBAL, None, 1, 64, (0,)),
        KVGroupSpec("sliding_w16", LayerKind.SLIDING, 16, 1, 64, (1,)),
        KVGroupSpec("sliding_w32", LayerKind.SLIDING, 32, 1, 64, (2,)),
    )


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        (None, {}),
        (32, {"global": 32, "sliding_w16": 32, "sliding_w32": 32}),
        ("sliding=16", {"sliding": 16}),
        ("all=32,sliding_w16=8", {"global": 32, "sliding_w16": 8, "sliding_w32": 32}),
        ("all=32,sliding=8", {"global": 32, "sliding": 8}),
    ],
)
def test_block_sizes_by_group(given: Any, sizes: dict[str, int]) -> None:
    assert EngineConfig(block_size=given).block_sizes(groups()) == sizes


def test_configs_cannot_be_changed() -> None:
    config = EngineConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dtype = "float32"  # type: ignore[misc]
    assert all(
        parameter.kind is inspect.Parameter.KEYWORD_ONLY
        for parameter in inspect.signature(EngineConfig).parameters.values()
    )
