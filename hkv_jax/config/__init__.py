"""Configuration: strict values, errors that say what is accepted, one table for Python, TOML and the command line."""

from hkv_jax.config.engine_config import DEMO_MODEL, EXPECTED_LENGTH_VARIABLE, EngineConfig, engine_options
from hkv_jax.config.limits import StepLimits, resolve_limits
from hkv_jax.config.options import Option, option, options_of, read_toml, settle

__all__ = [
    "DEMO_MODEL",
    "EXPECTED_LENGTH_VARIABLE",
    "EngineConfig",
    "Option",
    "StepLimits",
    "engine_options",
    "option",
    "options_of",
    "read_toml",
    "resolve_limits",
    "settle",
]
