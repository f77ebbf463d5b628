"""Compiles one case for a TPU that need not be there; run in a process of its own, since libtpu reads its flags once.

    python -m tools.tpu_costs.compile_case CASE_AS_JSON

Prints one JSON object. Where the schedule goes is in the environment that the parent made. Owns: lowering and
compiling. Must never: parse the dump.
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
    case = Case.from_json(sys.argv[1])
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(case.topology, platform="tpu")
    mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
    replicated = NamedSharding(mesh, PartitionSpec())

    def struct(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype), sharding=replicated)

    try:
        function, arguments, *donated = KERNELS[case.kernel].build(case, struct)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = jax.jit(function, donate_argnums=tuple(*donated)).lower(*arguments)
        # Of the processor, so that others at work on this machine do not count.
        begin = time.process_time()
        compiled = lowered.compile()
        seconds = time.process_time() - begin
    except Exception as error:
        json.dump({"error": f"{type(error).__name__}: {_first_line(error)}"}, sys.stdout)
        return 0
    memory: Any = compiled.memory_analysis()
    json.dump(
        {
            "compile_seconds": seconds,
            "alias_bytes": memory.alias_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
        },
        sys.stdout,
    )
    return 0


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or ["no message"])[0][:300]


if __name__ == "__main__":
    sys.exit(main())
