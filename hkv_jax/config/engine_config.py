"""The options of the engine.

Owns: their names, values and help, and which of them contradict each other. Must never: look at a model or a device
(``limits`` is told the platform).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from hkv_jax.config import option_kinds as kinds
from hkv_jax.config.options import Option, check_names, option, options_of, read_toml, settle
from hkv_jax.errors import ConfigError
from hkv_jax.spec import KVGroupSpec

EXPECTED_LENGTH_VARIABLE = "EXPECTED_AVERAGE_SEQ_LENGTH"
DEMO_NAME = "demo"
DEMO_MODEL = Path(__file__).resolve().parents[1] / "demo_model"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an engine is opened with; a field left at ``None`` is unset.

    The same values are accepted here as on the command line, in TOML and from the environment: ``"2GiB"`` is as good as
    2147483648. Fields hold what was read: a ``Path``, bytes, a mapping of block sizes. ``engine_options`` lists them.

    Raises:
        ConfigError: a value is not accepted, or two that are set disagree; the message says what would do.
    """

    model: Path = option(  # noqa: RUF009 - a field, like the others
        kinds.folder({DEMO_NAME: DEMO_MODEL}),
        "Folder of a Hugging Face checkpoint: config.json, *.safetensors, tokenizer.json. Which layers attend to "
        "everything and which to a window is read from it. demo is the bundled model (a folder of that name is "
        "./demo).",
        default=DEMO_MODEL,
        default_text="the bundled demo model",
    )
    dtype: str = option(
        kinds.choice("auto", "float32", "bfloat16"),
        "Type of weights and computation. auto is the checkpoint's own; float32 is exact and twice as large.",
        default="auto",
    )
    kv_cache_dtype: str = option(
        kinds.choice("auto", "float32", "bfloat16", "int8"),
        "Type of cached keys and values. auto is that of --dtype. int8 holds about twice the tokens of bfloat16 in the "
        "same memory, with a scale for each token and head; each number is off by up to 0.4 % of the largest beside "
        "it, so outputs differ a little.",
        default="auto",
    )
    max_model_len: int | None = option(
        kinds.count(unit="tokens"),
        "Most tokens of one sequence, prompt and output together. A shorter limit leaves more memory for others.",
        default_text="what config.json allows, or what fits; printed at start",
    )
    max_num_seqs: int | None = option(
        kinds.count(high=2**16, unit="sequences"),
        "Most sequences running at once; more wait. More of them raise throughput until compute or memory is used up.",
        default_text="256, on CPU 16; no more than the step's budget",
    )
    max_num_batched_tokens: int | None = option(
        kinds.count(high=2**20, unit="tokens"),
        "Budget of a step: every decoding sequence takes one token, prompts share the rest. A large budget finishes "
        "prompts sooner, a small one keeps the pace of the sequences that decode.",
        default_text="8192 on GPU, 2048 on TPU, 512 on CPU",
    )
    max_prefill_chunk: int | None = option(
        kinds.count(high=2**20, unit="tokens"),
        "Most tokens of one prompt in a step, so that a long prompt does not take a whole step from shorter ones.",
        default_text="the step's budget",
    )
    block_size: Mapping[str, int] | None = option(
        kinds.block_sizes(),
        "Tokens in a block of the KV cache, a power of two: 32, or global=32,sliding=16. Small blocks waste less, "
        "large ones are read faster.",
        default_text="by group; printed at start",
    )
    kv_cache_memory: int | None = option(
        kinds.memory(),
        "Memory of the KV cache per device, as 2GiB.",
        default_text="a share of what is free, see --kv-cache-memory-fraction",
    )
    kv_cache_memory_fraction: float | None = option(
        kinds.fraction(),
        "Share of the memory left by weights and the largest step that the KV cache takes; on CPU, of what the "
        "container may use. Not together with --kv-cache-memory.",
        default_text="0.9, on CPU 0.25",
    )
    kv_partition: str = option(
        kinds.choice("moving", "static"),
        "moving: global and sliding layers share one array, and the boundary between their pools moves to where memory "
        "saves most. static: an array for each, split at start.",
        default="moving",
    )
    expected_average_seq_length: int | None = option(
        kinds.count(unit="tokens"),
        "Tokens a typical sequence will have, prompt and output. Long ones need global blocks, short ones sliding "
        "blocks: with this number both pools run out together.",
        default_text="by the model's windows",
        environment=EXPECTED_LENGTH_VARIABLE,
    )
    enable_prefix_caching: bool = option(
        kinds.switch(),
        "Keep the keys and values of prompts and answers after they end, for as long as nothing else needs the memory: "
        "a request that begins with the same tokens does not compute them again.",
        default=True,
        default_text="enabled",
    )
    tail_repair: str = option(
        kinds.choice("exact", "off"),
        "What to do with a cached prefix whose sliding windows were given up while its global keys and values stayed. "
        "exact: compute just enough of its end again to have the windows back, exactly as they were. off: use only the "
        "shorter prefix whose windows are still there. The answers are the same, the work is not.",
        default="exact",
    )
    max_bypass_seconds: float = option(
        kinds.seconds(),
        "How long later requests whose prefix is cached may go before one that came earlier. More of it finds more in "
        "the cache, less of it keeps to the order of arrival.",
        default=30.0,
        default_text="30",
    )
    max_prefix_wait_seconds: float = option(
        kinds.seconds(zero="never wait"),
        "How long a request may wait for another one that is computing the prefix both begin with, where that is "
        "cheaper than computing it twice.",
        default=30.0,
        default_text="30",
    )
    tensor_parallel_size: int = option(
        kinds.count(high=4096, unit="devices"),
        "Devices the model is split over. It divides the query heads, and divides the kv heads or is their multiple.",
        default=1,
    )
    attention_backend: str = option(
        kinds.choice("auto", "xla", "pallas"),
        "xla runs everywhere. pallas is the TPU kernels, which a CPU interprets, to try them out. auto is pallas on "
        "TPU, xla elsewhere.",
        default="auto",
    )
    generation_config: str = option(
        kinds.choice("model", "neutral"),
        "Where sampling options that a request leaves unset come from: model is the checkpoint's "
        "generation_config.json, neutral is plain sampling.",
        default="model",
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.kv_cache_memory is not None and self.kv_cache_memory_fraction is not None:
            raise ConfigError("kv_cache_memory and kv_cache_memory_fraction are both set; leave one out")
        _check_order(
            self, "max_num_seqs", "max_num_batched_tokens", "every decoding sequence takes one token of a step"
        )
        _check_order(self, "max_prefill_chunk", "max_num_batched_tokens", "a chunk is part of a step")

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> Self:
        """From options by name, unset ones left out or ``None``.

        Raises:
            ConfigError: a name is unknown (the message has the nearest), or as the class says.
        """
        check_names(options, [one.name for one in engine_options()], "engine options")
        return cls(**options)  # type: ignore[arg-type]

    @classmethod
    def from_toml(cls, path: Path, overrides: Mapping[str, object] | None = None) -> Self:
        """From a TOML file of options; ``overrides`` that are set beat it.

        Raises:
            ConfigError: the file cannot be read or sets an unknown option, or as the class says.
        """
        values = read_toml(path, [one.name for one in engine_options()])
        return cls.from_options(values | {name: one for name, one in (overrides or {}).items() if one is not None})

    def block_sizes(self, groups: Sequence[KVGroupSpec]) -> dict[str, int]:
        """``block_size`` by the names it was given for; a size for all groups by the name of each of ``groups``."""
        given = dict(self.block_size or {})
        everywhere = given.pop(kinds.ALL_GROUPS, None)
        if everywhere is None:
            return given
        named = [group for group in groups if group.name in given or str(group.kind) in given]
        return {group.name: everywhere for group in groups if group not in named} | given


def engine_options() -> tuple[Option, ...]:
    """Every option of the engine, in the order they are best read: what the command line's flags are made from."""
    return options_of(EngineConfig)


def _check_order(config: EngineConfig, smaller: str, larger: str, reason: str) -> None:
    low, high = getattr(config, smaller), getattr(config, larger)
    if low is not None and high is not None and low > high:
        raise ConfigError(
            f"{smaller} ({low}) is more than {larger} ({high}), but {reason}; raise {larger} or lower {smaller}"
        )
