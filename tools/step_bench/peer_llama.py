"""llama.cpp as a peer, by the plain functions of llama-cpp-python.

Owns: the default settings of llama.cpp, but a cache that keeps only the window of sliding layers, and weights in
ordinary memory, which may have huge pages as the other peers' have. Must never: import hkv_jax.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from tools.step_bench import worker_loop

PADDING = 256
"""llama.cpp rounds a sequence's room to this; it is room for the tokens the measurement draws, too."""


class LlamaPeer:
    """A GGUF file; the context, with its cache, is made anew for each batch."""

    def __init__(self, model: Path, threads: int, options: dict[str, Any]) -> None:
        """Loads the file; ``options["cache"]`` is the type of K/V: f16 or bf16."""
        llama_cpp.llama_backend_init()
        features = llama_cpp.llama_print_system_info().decode()
        self.versions = {"llama-cpp-python": llama_cpp.__version__, "llama.cpp features": features}
        params = llama_cpp.llama_model_default_params()
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self._model = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model.name}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads = threads
        self._cache_type = int(gguf.GGMLQuantizationType[options["cache"].upper()])
        self._context: Any = None
        self._batch: Any = None
        self._next: list[int] = []
        self._position = 0

    def start(self, prompts: list[list[int]]) -> None:
        """Prefills the first prompt and copies its K/V."""
        self._open(len(prompts), len(prompts[0]))
        token = self._decode_prompt(prompts[0])
        memory = llama_cpp.llama_get_memory(self._context)
        for sequence in range(1, len(prompts)):
            llama_cpp.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        self._next = [token] * len(prompts)
        self._position = len(prompts[0])

    def step(self) -> int:
        """Decodes one token a sequence; the token it *begins with*, since the prefill drew the first."""
        drawn = self._next[0]
        self._fill([(token, self._position, sequence, True) for sequence, token in enumerate(self._next)])
        self._position += 1
        self._next = [self._argmax(sequence) for sequence in range(len(self._next))]
        return drawn

    def stop(self) -> None:
        """Frees context and cache."""
        if self._context is not None:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
            self._context = None

    def prefill(self, prompt: list[int]) -> int:
        """Decodes a prompt into an empty cache, logits of its last token only; the context is kept for the next."""
        if self._context is None:
            self._open(1, len(prompt))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        return self._decode_prompt(prompt)

    def _open(self, sequences: int, tokens: int) -> None:
        self.stop()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * (tokens + PADDING)
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = self._cache_type
        params.swa_full = False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._batch = llama_cpp.llama_batch_init(llama_cpp.llama_n_batch(self._context), 0, 1)

    def _decode_prompt(self, prompt: list[int]) -> int:
        size = llama_cpp.llama_n_batch(self._context)
        for start in range(0, len(prompt), size):
            part = prompt[start : start + size]
            last = len(prompt) - 1
            self._fill([(token, start + i, 0, start + i == last) for i, token in enumerate(part)])
        return self._argmax(-1)

    def _fill(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Runs a batch of (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode of {len(rows)} tokens: status {status}")

    def _argmax(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


if __name__ == "__main__":
    worker_loop.run(LlamaPeer)
