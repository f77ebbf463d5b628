"""How much memory a device has for the KV cache.

Owns: asking the platform. On CPU that is what the control group allows, not what the host has: a container that
believes the host is killed. Must never: import jax at module level, or divide the memory (``kvcache.layout`` does).
"""

from __future__ import annotations

import os
from pathlib import Path

CPU_FRACTION = 0.25
DEVICE_FRACTION = 0.9
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def host_memory_bytes() -> int:
    """Bytes this process may use: the physical memory, or less where its control group says so."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(_limit(path) or physical for path in _CGROUP_LIMITS)])


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
