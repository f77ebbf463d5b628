"""What a server did lately, as a line for whoever watches its log.

Owns: the words of that line. Must never: have one for a time in which nothing happened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hkv_jax.outputs import PrefixHit

if TYPE_CHECKING:
    from hkv_jax.engine.stats import EngineStats


def activity(before: EngineStats, now: EngineStats, seconds: float) -> str | None:
    """What happened in the ``seconds`` between two states of an engine, ``None`` if nothing did."""
    output_tokens = now.num_output_tokens - before.num_output_tokens
    prompt_tokens = now.prefix.prompt_tokens - before.prefix.prompt_tokens
    if not (now.num_running or now.num_waiting or output_tokens or prompt_tokens):
        return None
    used = ", ".join(f"{pool.name} {pool.used_blocks / max(1, pool.num_blocks):.0%}" for pool in now.pools)
    parts = [
        f"{now.num_running} running, {now.num_waiting} waiting",
        f"{prompt_tokens / seconds:.1f} prompt and {output_tokens / seconds:.1f} output tokens/s",
        f"blocks in use: {used}",
    ]
    if prompt_tokens:
        reused = now.prefix.prefix_hit_tokens - before.prefix.prefix_hit_tokens
        hits = {hit: now.prefix.hits.get(hit, 0) - before.prefix.hits.get(hit, 0) for hit in PrefixHit}
        counts = ", ".join(f"{count} {hit}" for hit, count in hits.items() if count)
        parts.append(f"{reused / prompt_tokens:.0%} of prompt tokens were cached ({counts})")
    return "; ".join(parts)
