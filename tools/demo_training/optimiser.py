"""The optimiser: Muon (Jordan et al., 2024) for the layers' matrices, Adam for embeddings and norms, from optax.

Owns: which parameter is trained how, and the schedule. Must never: know the model's function.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
MUON_RATE = 0.02
ADAM_RATE = 3e-3


def make(total_steps: int) -> optax.GradientTransformation:
    """Both optimisers with a short warm-up and a linear decay to a twentieth over ``total_steps``."""

    def schedule(peak: float) -> optax.Schedule:
        warm_up = min(20, total_steps // 10 + 1)
        rise = optax.linear_schedule(peak / warm_up, peak, warm_up)
        fall = optax.linear_schedule(peak, peak / 20, total_steps - warm_up)
        return optax.join_schedules([rise, fall], [warm_up])

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(MUON_RATE),
            adam_b2=0.99,
            adam_learning_rate=schedule(ADAM_RATE),
            muon_weight_dimension_numbers=_dimensions,
        ),
    )


def _dimensions(parameters: Mapping[str, jax.Array]) -> dict[str, MuonDimensionNumbers | None]:
    """Matrices are stacked over layers, each ``[in, out]``; everything else is Adam's."""
    matrix = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return {name: matrix if name in MATRICES else None for name in parameters}
