"""Every kernel compiled ahead of time for TPUs that need not be there, at 256 sequences of 128k tokens.

On v6e all shapes, on the other chips one of each kernel, with int8 K/V fewer; ``make tpu-compile-all`` does the rest.
That a case compiles says that its tables fit scalar memory and its tiles vector memory: the compiler counts both.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.tpu_compile.needs_libtpu import NEEDS_LIBTPU
from tools.tpu_costs.cases import Case
from tools.tpu_costs.chips import CHIPS
from tools.tpu_costs.suite import cases, compile_all, few_cases, pool_bytes

MIB = 1 << 20

pytestmark = NEEDS_LIBTPU

V6E = cases(CHIPS["v6e"].topology)
OTHERS = {
    f"{name}, {chip}": case
    for chip in ("v5e", "v5p", "tpu7x")
    for name, case in few_cases(CHIPS[chip].topology).items()
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """What the compiler said of each case."""
    return compile_all(V6E | OTHERS)


@pytest.mark.parametrize("name", list(V6E | OTHERS))
def test_it_compiles_in_place(compiled: dict[str, dict[str, Any]], name: str) -> None:
    case, result = (V6E | OTHERS)[name], compiled[name]
    assert "error" not in result, result["error"]
    writes = case.kernel in ("windowed", "paged", "kv-update")
    # The pool is updated where it lies, its scales with it.
    assert result["alias_bytes"] == (pool_bytes(case) if writes else 0)
    assert result["temp_bytes"] <= most_temporaries(case)
    print(f"{name}: {result['compile_seconds']} s of processor time")  # noqa: T201


def most_temporaries(case: Case) -> int:
    """Queries, outputs and new rows once more in another layout (a model makes them so to begin with), and tables."""
    geometry, tokens = case.geometry, case.batch * case.chunk
    lanes = max(geometry.head_dim, 128 if geometry.head_dim > 64 else 64)
    arrays = 2 * geometry.q_heads + 2 * geometry.kv_heads
    return 2 * tokens * arrays * lanes * 4 + MIB
