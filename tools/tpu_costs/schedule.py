"""The compiler's final schedule of one kernel, read from its dump: bundles, loops, conditional code, units, copies.

A bundle is what a core issues in one cycle. The dump has one line a bundle, with one ``>`` a loop around it, and a
second file with the slots that each bundle takes of each unit.

Owns: parsing. Must never: guess how often code runs; that is a model, and ``trips`` has it.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:([A-Z]{2}): ?|: ?)? ?(>*) ?\{")
_BRANCH = re.compile(r"sbr\.rel (?:\((!?%p\w+)\) )?target = \$region(\d+)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_GRANULES = re.compile(r"/\*size_in_granules=\*/(\d+)")
_ALLOCATION = re.compile(r"space=(\w+), size = (0x[0-9a-f]+)")
GRANULE_BYTES = 32

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL", "SALU")


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy that the code issues: where (bundle), which way, and the granules it says it moves (0: not static)."""

    bundle: int
    way: str
    granules: int


@dataclasses.dataclass
class Loop:
    """A loop: bundles [start, end), the loops in it, and the stretches [start, end) that a branch may skip."""

    start: int
    end: int
    depth: int
    loops: list[Loop] = dataclasses.field(default_factory=list)
    skips: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    @property
    def bundles(self) -> int:
        """Bundles, those of inner loops included."""
        return self.end - self.start

    @property
    def own_bundles(self) -> int:
        """Bundles outside inner loops."""
        return self.bundles - sum(loop.bundles for loop in self.loops)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One kernel: the code as a loop of depth 0, slots taken int[bundles, units], their capacity, copies, memory."""

    name: str
    code: Loop
    slots: NDArray[np.int64]
    capacity: NDArray[np.int64]
    copies: tuple[Copy, ...]
    vmem_bytes: int
    smem_bytes: int

    @property
    def num_bundles(self) -> int:
        """All bundles."""
        return self.code.bundles

    def copies_in(self, start: int, end: int) -> tuple[Copy, ...]:
        """The copies issued by bundles [start, end)."""
        return tuple(copy for copy in self.copies if start <= copy.bundle < end)


def kernels_in(folder: Path) -> list[str]:
    """Prefixes of the dumped files of each program that a compilation made."""
    return sorted(
        path.name.split("-final_bundles")[0].rpartition("-")[0] for path in folder.glob("*-final_bundles.txt")
    )


def read_kernel(folder: Path, kernel: str) -> Schedule:
    """Reads the schedule of the largest program whose name contains ``kernel``.

    Raises:
        FileNotFoundError: the dump has none.
    """
    prefixes = [prefix for prefix in kernels_in(folder) if kernel in prefix]
    if not prefixes:
        raise FileNotFoundError(f"no program called {kernel!r} among {kernels_in(folder)}")
    schedules = [_read(folder, prefix) for prefix in prefixes]
    return max(schedules, key=lambda schedule: schedule.num_bundles)


def _read(folder: Path, prefix: str) -> Schedule:
    def text_of(suffix: str) -> str:
        # The dumped number in the middle of the name differs from program to program.
        found = [p for p in folder.glob(f"*{suffix}") if p.name.startswith(prefix + "-")]
        return found[0].read_text(encoding="utf-8", errors="replace") if found else ""

    slots, capacity = _utilisation(text_of("-final_hlo-static-per-bundle-utilization.txt"))
    code, copies = parse_bundles(text_of("-final_bundles.txt"), len(slots))
    memory = _allocations(text_of("-pre-finalize-registers-and-allocations.txt"))
    return Schedule(prefix, code, slots, capacity, copies, memory.get("vmem", 0), memory.get("smem", 0))


def _utilisation(text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lines = text.splitlines()
    assert [name.strip() for name in lines[1].split(",")] == list(UNITS), lines[1]
    rows = [[int(number) for number in line.split()] for line in lines[4:] if line.strip()]
    return np.array(rows), np.array([int(number) for number in lines[2].split()])


def _allocations(text: str) -> dict[str, int]:
    totals: dict[str, int] = {}
    for space, size in _ALLOCATION.findall(text):
        totals[space] = totals.get(space, 0) + int(size, 16)
    return totals


def parse_bundles(text: str, num_bundles: int) -> tuple[Loop, tuple[Copy, ...]]:
    """Loops, conditional stretches and copies of the text of ``*-final_bundles.txt``."""
    code = Loop(0, num_bundles, 0)
    open_loops, copies = [code], []
    branches: list[tuple[int, str]] = []
    region_starts: dict[str, int] = {}
    bundle = 0
    for line in text.splitlines():
        head = _BUNDLE.match(line)
        if head:
            bundle = int(head.group(1), 16)
            _enter_loops(open_loops, bundle, head.group(2) == "LB", len(head.group(3)), line)
        for region in _REGION.findall(line):
            region_starts.setdefault(region, bundle)
        branches += [(bundle, target) for _, target in _BRANCH.findall(line)]
        if head or "size_in_granules" in line:
            copies += _copies(line, bundle)
    while len(open_loops) > 1:
        open_loops.pop().end = num_bundles
    for start, target in branches:
        end = region_starts.get(target, -1)
        if end > start:
            _innermost(code, start).skips.append((start + 1, end))
    return code, tuple(copies)


def _enter_loops(open_loops: list[Loop], bundle: int, begins: bool, depth: int, line: str) -> None:
    """Opens and closes loops at a bundle; the empty bundles after a branch carry no mark and change nothing."""
    if not depth and re.match(r"[^{]*\{\}", line):
        return
    while open_loops[-1].depth > depth or (begins and open_loops[-1].depth == depth):
        open_loops.pop().end = bundle
    while depth > open_loops[-1].depth:
        parent = open_loops[-1]
        if not begins and parent.loops:
            # The branch back is marked as outside; what runs in its delay slots is inside again.
            open_loops.append(parent.loops[-1])
            continue
        loop = Loop(bundle, bundle, depth)
        parent.loops.append(loop)
        open_loops.append(loop)


def _innermost(loop: Loop, bundle: int) -> Loop:
    for inner in loop.loops:
        if inner.start <= bundle < inner.end:
            return _innermost(inner, bundle)
    return loop


def _copies(line: str, bundle: int) -> list[Copy]:
    # A bounds check quotes the copy that it guards; what is issued stands at the start of an instruction.
    found = []
    for part in re.split(r"\{ |;; ", line):
        issued = re.match(r"%\w+ = dma\.([\w.]+)", part.strip())
        if issued and not issued.group(1).startswith("done"):
            granules = _GRANULES.search(part)
            found.append(Copy(bundle, issued.group(1), int(granules.group(1)) if granules else 0))
    return found
