"""The ways of keeping a cache that a simulation compares.

Owns: their names, and what each changes. Must never: implement one (``hkv_jax.kvcache`` does).
"""

from __future__ import annotations

import dataclasses

from tools.cache_simulation.model_geometry import ModelGeometry


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """One way; ``summary`` is for ``--help``. ``all_global``: the cache knows no windows."""

    name: str
    summary: str
    all_global: bool = False

    def geometry(self, geometry: ModelGeometry) -> ModelGeometry:
        """The model as the cache of this policy sees it."""
        return geometry.all_global() if self.all_global else geometry


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("hybrid", "the engine's own"),
        Policy("all-global", "sliding layers keep everything, as a cache without windows would", all_global=True),
    )
}
