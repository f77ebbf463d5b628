"""Every kernel that can be measured, by name: how to build it, and what a step of it does.

Owns: the registry. Must never: import jax when it is loaded; building does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tools.tpu_costs import jax_kernels, our_kernels, our_prefill
from tools.tpu_costs.cases import Case
from tools.tpu_costs.measured import Work
from tools.tpu_costs.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Kernel:
    """``build(case, struct)`` gives the function, its arguments' shapes and, if any, which are donated.

    ``program`` is in the name of its program in the dump; ``work(case, schedule)`` lays trip counts over it.
    """

    build: Callable[..., tuple[Any, ...]]
    program: str
    work: Callable[[Case, Schedule], Work]


KERNELS: dict[str, Kernel] = {
    "windowed": Kernel(our_kernels.windowed_decode, "_decode", our_kernels.windowed_decode_work),
    "paged": Kernel(our_kernels.paged_decode, "paged_decode", our_kernels.paged_decode_work),
    "windowed-prefill": Kernel(our_prefill.prefill, "windowed_prefill", our_prefill.prefill_work),
    "paged-prefill": Kernel(our_prefill.prefill, "paged_prefill", our_prefill.prefill_work),
    "kv-update": Kernel(our_prefill.update, "kv_update", our_prefill.update_work),
    "jax-ragged": Kernel(jax_kernels.ragged, "ragged_paged_attention", jax_kernels.ragged_work),
    "jax-paged": Kernel(jax_kernels.paged, "paged", jax_kernels.paged_work),
}
