"""How much memory a device has for the KV cache.

Owns: asking the platform. On CPU that is what the control groups allow, not what the host has: a container that
believes the host is killed. Must never: import jax at module level, or divide the memory (``kvcache.layout`` does).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CPU_FRACTION = 0.25
DEVICE_FRACTION = 0.9
_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


def host_memory_bytes(membership: Path = _MEMBERSHIP, mount: Path = _MOUNT) -> int:
    """Bytes this process may use: the physical memory, or less where a control group it is in says so.

    Args:
        membership: the file that names the process's groups.
        mount: where the groups are.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(_limit(path) or physical for path in _limit_files(membership, mount))])


def _limit_files(membership: Path, mount: Path) -> Iterator[Path]:
    """The limit of each group the process is in, from its own up to the root, for both versions of control groups.

    In a container the root is often the container's own group, whatever the membership says.
    """
    yield mount / "memory.max"
    yield mount / "memory" / "memory.limit_in_bytes"
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        group = Path(path.lstrip("/"))
        for place in (group, *group.parents):
            if not controllers:
                yield mount / place / "memory.max"
            elif "memory" in controllers.split(","):
                yield mount / "memory" / place / "memory.limit_in_bytes"


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
