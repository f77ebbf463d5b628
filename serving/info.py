"""What a server says about itself: plain data, made from the engine's counts and sent by ``GetServerInfo``.

Owns: the meaning of these numbers, on both ends of the wire. Must never: import grpc or jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import hkv_jax
from hkv_jax.engine.prefix_stats import PrefixStats

if TYPE_CHECKING:
    from hkv_jax.engine.loop import EngineLoop

_GLOBAL = "global"


@dataclasses.dataclass(frozen=True, slots=True)
class PoolInfo:
    """The pool of one attention group since start: counts of blocks, ``block_size`` in tokens, bytes on one device.

    ``name`` begins with the kind of its layers, ``global`` or ``sliding``. Requests hold the ``used_blocks``; the
    ``cached_blocks`` nobody holds, but the next request that begins with the same tokens can use them. The
    ``released_early_blocks`` were given back while their request ran, because the window had moved past them.
    """

    name: str
    block_size: int
    block_bytes: int
    num_blocks: int
    used_blocks: int
    peak_used_blocks: int
    released_early_blocks: int
    cached_blocks: int

    @property
    def peak_bytes(self) -> int:
        """Bytes in use at the peak of this pool."""
        return self.peak_used_blocks * self.block_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class ServerInfo:
    """What is served, within which limits (tokens, ids, sequences), and what the KV cache holds and has saved.

    ``slabs_moved`` counts how often a part of the memory went from one pool to another, ``copied_bytes`` what that made
    one device copy.
    """

    version: str
    model: str
    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    running_sequences: int
    waiting_sequences: int
    pools: tuple[PoolInfo, ...]
    all_global_peak_bytes: int | None
    prefix: PrefixStats
    slabs_moved: int
    copied_bytes: int


def all_global_peak_bytes(pools: Sequence[PoolInfo]) -> int | None:
    """Bytes that a cache which never releases a block of a window would have held at the peak of the global pool.

    The global pool keeps every token, so its peak says how many tokens there were; without one nothing tells it, and
    the answer is ``None``.
    """
    tokens = [pool.peak_used_blocks * pool.block_size for pool in pools if pool.name.startswith(_GLOBAL)]
    if not tokens:
        return None
    return sum(-(-max(tokens) // pool.block_size) * pool.block_bytes for pool in pools)


def server_info(model: str, loop: EngineLoop) -> ServerInfo:
    """About the engine that runs in ``loop`` and serves ``model``, now."""
    stats, limits = loop.stats(), loop.limits
    names = [field.name for field in dataclasses.fields(PoolInfo)]
    pools = tuple(PoolInfo(**{name: getattr(pool, name) for name in names}) for pool in stats.pools)
    return ServerInfo(
        version=hkv_jax.__version__,
        model=model,
        max_model_len=limits.max_model_len,
        vocab_size=limits.vocab_size,
        max_num_seqs=limits.max_num_seqs,
        running_sequences=stats.num_running,
        waiting_sequences=stats.num_waiting,
        pools=pools,
        all_global_peak_bytes=all_global_peak_bytes(pools),
        prefix=stats.prefix,
        slabs_moved=stats.num_slabs_moved,
        copied_bytes=stats.copied_bytes,
    )
