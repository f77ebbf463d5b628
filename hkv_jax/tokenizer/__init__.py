"""Text in and out: the tokenizer of a model folder, its chat template, and text that grows token by token.

A leaf: it knows files and strings, neither requests nor threads, and never imports jax.
"""

from __future__ import annotations

from hkv_jax.tokenizer.detokenizer import Detokenizer
from hkv_jax.tokenizer.stop_strings import StopScanner, StopStrings
from hkv_jax.tokenizer.tokenizer import Tokenizer

__all__ = ["Detokenizer", "StopScanner", "StopStrings", "Tokenizer"]
