"""What a prefix cache is told to do.

Owns: ``CachePolicy``. Must never: hold state.
"""

from __future__ import annotations

import dataclasses

from hkv_jax.kvcache.eviction_queue import EvictionOrder
from hkv_jax.kvcache.worth import WorthOrder


@dataclasses.dataclass(frozen=True)
class CachePolicy:
    """How cached prefixes are kept and used.

    Attributes:
        enabled: finished sequences leave their blocks to later ones.
        tail_repair: a lost sliding tail is rebuilt where that costs less than what it saves.
        checkpoints: tails are kept where later requests can join; without, only what happens to be left serves.
        order: which join point is evicted first.
    """

    enabled: bool = True
    tail_repair: bool = True
    checkpoints: bool = True
    order: EvictionOrder = dataclasses.field(default_factory=WorthOrder)
