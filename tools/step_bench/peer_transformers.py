"""Hugging Face transformers as a peer: forward and argmax, with the cache the model makes for itself.

Owns: the leanest correct use of it; ``generate`` adds time of its own, which is left out. Must never: import hkv_jax.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tools.step_bench import worker_loop


class TransformersPeer:
    """A model in bf16 with sdpa and DynamicCache, whose sliding layers keep only their window."""

    def __init__(self, model: Path, threads: int, _options: dict[str, Any]) -> None:
        """Loads the folder."""
        torch.set_num_threads(threads)
        self.versions = {"transformers": transformers.__version__, "torch": str(torch.__version__)}
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._cache: Any = None
        self._next: Any = None

    @torch.inference_mode()
    def start(self, prompts: list[list[int]]) -> None:
        """Prefills the first prompt and copies its K/V."""
        self.stop()
        self._forward(torch.tensor([prompts[0]]))
        if len(prompts) > 1:
            self._cache.batch_repeat_interleave(len(prompts))
            self._next = self._next.repeat_interleave(len(prompts), 0)

    @torch.inference_mode()
    def step(self) -> int:
        """A forward pass of one token a sequence; the token it *begins with*, since the prefill drew the first."""
        token = int(self._next[0, 0])
        self._forward(self._next)
        return token

    def stop(self) -> None:
        """Lets go of the cache."""
        self._cache = self._next = None

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> int:
        """A forward pass of the whole prompt, logits of its last token only."""
        self.stop()
        self._forward(torch.tensor([prompt]))
        token = int(self._next[0, 0])
        self.stop()
        return token

    def _forward(self, tokens: Any) -> None:
        output = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        self._next = output.logits[:, -1:].argmax(-1)


if __name__ == "__main__":
    worker_loop.run(TransformersPeer)
