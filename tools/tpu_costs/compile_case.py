"""Compiles cases for TPUs that need not be there; run in a process of its own, since libtpu reads its flags once.

    python -m tools.tpu_costs.compile_case CASE_AS_JSON ...

Prints one JSON object a case, in a line of its own. Where schedules go is in the environment that the parent made.

Owns: lowering and compiling. Must never: parse a dump.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from tools.tpu_costs.cases import Case
from tools.tpu_costs.kernels import KERNELS


def main() -> int:
    """Compiles and prints what came out; a kernel that does not compile is a result too."""
    for text in sys.argv[1:]:
        try:
            result = compile_case(Case.from_json(text))
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {_first_line(error)}"}
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    return 0


def compile_case(case: Case) -> dict[str, Any]:
    """Bytes and seconds of one compilation; the seconds are the processor's, so that others at work do not count."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(case.topology, platform="tpu")
    mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
    replicated = NamedSharding(mesh, PartitionSpec())

    def struct(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype), sharding=replicated)

    function, arguments, *donated = KERNELS[case.kernel].build(case, struct)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function, donate_argnums=tuple(*donated)).lower(*arguments)
    begin = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - begin
    memory: Any = compiled.memory_analysis()
    return {
        "compile_seconds": round(seconds, 2),
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


def _first_line(error: Exception) -> str:
    """What went wrong, without what it says of paths on this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or ["no message"])[0].partition(" at /")[0][:120]


if __name__ == "__main__":
    sys.exit(main())
