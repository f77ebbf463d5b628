"""Attention written for reading: one query and one head at a time over a whole sequence, in float64 numpy.

Owns: what every attention path must agree with. Must never: be fast, or import jax.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class ReferenceAttention:
    """``window`` in tokens (``None``: global), ``scale`` on scores, ``soft_cap``, ``sinks`` [H] (``None``: without)."""

    window: int | None
    scale: float
    soft_cap: float | None = None
    sinks: NDArray[np.float64] | None = None

    def __call__(
        self, queries: NDArray[np.float64], keys: NDArray[np.float64], values: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Causal attention of queries [N, H, D] over keys and values [N, K, D]: [N, H, D]."""
        outputs = np.zeros(queries.shape)
        heads_a_group = queries.shape[1] // keys.shape[1]
        for position in range(queries.shape[0]):
            first = 0 if self.window is None else max(0, position - self.window + 1)
            for head in range(queries.shape[1]):
                seen = slice(first, position + 1), head // heads_a_group
                scores = keys[seen] @ queries[position, head] * self.scale
                if self.soft_cap is not None:
                    scores = self.soft_cap * np.tanh(scores / self.soft_cap)
                weights = np.exp(scores - scores.max())
                sink = 0.0 if self.sinks is None else np.exp(self.sinks[head] - scores.max())
                outputs[position, head] = weights @ values[seen] / (weights.sum() + sink)
        return outputs
