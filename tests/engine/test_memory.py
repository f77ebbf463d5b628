"""What a process may use is what its control groups allow, whichever version they are and wherever it is in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hkv_jax.engine.memory import host_memory_bytes

LIMIT = 64 * 2**20


@pytest.mark.parametrize(
    ("membership", "file"),
    [
        ("", "memory.max"),
        ("0::/a/b\n", "a/b/memory.max"),
        ("0::/a/b\n", "a/memory.max"),
        ("", "memory/memory.limit_in_bytes"),
        ("4:cpu,memory:/a/b\n0::/\n", "memory/a/b/memory.limit_in_bytes"),
        ("4:cpu,memory:/a/b\n0::/\n", "memory/a/memory.limit_in_bytes"),
    ],
)
def test_the_smallest_limit_of_any_group_counts(tmp_path: Path, membership: str, file: str) -> None:
    (tmp_path / "cgroup").write_text(membership)
    limits = {"memory.max": "max", "memory/memory.limit_in_bytes": str(2**63 - 4096), file: str(LIMIT)}
    for name, text in limits.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert host_memory_bytes(tmp_path / "cgroup", tmp_path / "mount") == LIMIT


def test_without_groups_it_is_the_physical_memory(tmp_path: Path) -> None:
    without = host_memory_bytes(tmp_path / "absent", tmp_path / "absent")
    assert without >= host_memory_bytes() > 0
    (tmp_path / "cgroup").write_text("4:cpu:/a\nnonsense\n")
    assert host_memory_bytes(tmp_path / "cgroup", tmp_path) == without
