"""The machine a measurement runs on: what its CPU can do, which cores are used, who else uses them.

Owns: reading that from the operating system, as far as it tells. Must never: need more than the standard library (the
peers' environments import it too).
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "bf16", "sve")
"""What decides how fast 16-bit arithmetic is; the last two are Arm's names."""


COUNTERS = Path("/proc/stat")


def describe_cpu() -> dict[str, object]:
    """Model name and those of ``FLAGS`` it has and lacks; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    present = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "model": fields.get("model name", platform.processor() or platform.machine()),
        "flags": [flag for flag in FLAGS if flag in present],
        "missing": [flag for flag in ("avx512_bf16", "amx_bf16") if flag not in present],
        "pinned": hasattr(os, "sched_setaffinity"),
    }


def available_cores() -> list[int]:
    """Numbers of the cores this process may use, ascending."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def share_hardware(cores: list[int]) -> bool:
    """Whether two of ``cores`` are threads of the same physical core."""
    siblings = [_siblings(core) for core in cores]
    return any(a in siblings[index] for index in range(len(cores)) for a in cores if a != cores[index])


def _siblings(core: int) -> set[int]:
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text(encoding="utf-8")
    except OSError:
        return {core}
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def pin(cores: list[int]) -> None:
    """Keeps this process, and the threads it will start, on ``cores``; does nothing where the system cannot."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def busy_seconds(cores: list[int]) -> float | None:
    """CPU seconds all processes took of ``cores`` since the system started, stolen time too; ``None``: unknown."""
    wanted = {f"cpu{core}" for core in cores}
    try:
        rows = [line.split() for line in COUNTERS.read_text(encoding="utf-8").splitlines()]
        tick = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    # user, nice, system, (idle, iowait), irq, softirq, steal
    ticks = [sum(int(row[column]) for column in (1, 2, 3, 6, 7, 8)) for row in rows if row and row[0] in wanted]
    return sum(ticks) / tick if len(ticks) == len(wanted) and any(ticks) else None
