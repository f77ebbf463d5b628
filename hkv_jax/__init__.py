"""hkv-jax: a JAX inference runtime whose KV cache knows global from sliding-window attention.

``from hkv_jax import LLM, SamplingParams`` is the whole public surface; importing the package loads nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hkv_jax.outputs import Completion, RequestOutput, TokenLogprob, Usage
from hkv_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from hkv_jax.llm import LLM

__all__ = ["LLM", "Completion", "RequestOutput", "SamplingParams", "TokenLogprob", "Usage", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "LLM":
        from hkv_jax.llm import LLM

        return LLM
    raise AttributeError(f"module 'hkv_jax' has no attribute {name!r}")
