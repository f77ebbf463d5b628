"""How fast the cores read memory: the sum of a large array, with torch. Prints GB/s.

    python -m tools.step_bench.bandwidth CORES BYTES

Owns: that figure, which bounds every step that reads all weights. Must never: touch a model.
"""

from __future__ import annotations

import sys
import time

import torch

from tools.step_bench import machine

ATTEMPTS = 7


def main() -> None:
    """The best of several attempts: the limit is what is possible, not what is usual."""
    cores = [int(core) for core in sys.argv[1].split(",")]
    machine.pin(cores)
    torch.set_num_threads(len(cores))
    data = torch.ones(int(sys.argv[2]) // 4, dtype=torch.float32)
    best = 0.0
    for _ in range(ATTEMPTS):
        began = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - began) / 1e9)
    print(best)


if __name__ == "__main__":
    main()
