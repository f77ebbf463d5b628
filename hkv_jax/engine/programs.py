"""The compiled programs of an engine: one a bucket, and those that change its state between steps.

Owns: compiling all of them ahead of the first request. A ``Compiled`` program cannot recompile: an argument whose
shape or dtype differs is an error that names it. Must never: run a step.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hkv_jax.engine.batch_format import BatchFormat, Bucket
from hkv_jax.engine.device_state import (
    COPIES_A_CALL,
    FORKS_A_CALL,
    MAX_MASKED_STOPS,
    PREFIX_TOKENS_A_CALL,
    TABLE_ROWS_A_CALL,
    BlockCopies,
    DeviceState,
    ForkCopies,
    LaneSetup,
    PrefixTokens,
    TableRows,
    copy_state_blocks,
    count_prefix,
    fork_lanes,
    install_table_rows,
    set_up_lane,
)
from hkv_jax.engine.step import StepProgram
from hkv_jax.kvcache.layout import KVLayout
from hkv_jax.model.parameters import Progress
from hkv_jax.model.transformer import Decoder, ModelParameters
from hkv_jax.model.xla_attention import AttentionSpec
from hkv_jax.sampling_params import MAX_LOGIT_BIASES
from hkv_jax.sharding import REPLICATED, named

COMPILE_THREADS = 2
COMPILE_STACK_BYTES = 64 * 1024 * 1024
"""XLA recurses deeply on long unrolled programs; the default thread stack overflows."""


class ProgramFactory:
    """Lowers the programs of one engine for given shapes, without allocating anything.

    ``matmul_precision`` is what products use: ``highest`` for float32, so that no platform rounds them silently.
    """

    step_program: type[StepProgram] = StepProgram

    def __init__(
        self, decoder: Decoder, attention: tuple[AttentionSpec, ...], layout: KVLayout, matmul_precision: str | None
    ) -> None:
        self._decoder, self._attention, self._layout = decoder, attention, layout
        self._precision = matmul_precision

    def lower_step(
        self, batch_format: BatchFormat, parameters: ModelParameters, state: DeviceState
    ) -> jax.stages.Lowered:
        """The step of one bucket; ``parameters`` and ``state`` are arrays or their shapes. The state is donated."""
        program = self.step_program(self._decoder, self._attention, batch_format)
        buffers = (
            self._replicated((batch_format.num_ints,), np.int32),
            self._replicated((batch_format.num_floats,), np.float32),
        )
        return self._lower(
            program, (parameters, state, *buffers), donate=1, outputs=(_shardings(state), self._sharding())
        )

    def lower_lane_setup(self, state: DeviceState) -> jax.stages.Lowered:
        """Installs one sequence's biases and masked stops."""
        setup = LaneSetup(
            self._replicated((), np.int32),
            self._replicated((MAX_LOGIT_BIASES,), np.int32),
            self._replicated((MAX_LOGIT_BIASES,), np.float32),
            self._replicated((MAX_MASKED_STOPS,), np.int32),
        )
        return self._lower_edit(set_up_lane, state, setup)

    def lower_forks(self, state: DeviceState) -> jax.stages.Lowered:
        """A few forks at a time."""
        lanes = self._replicated((FORKS_A_CALL,), np.int32)
        pages = self._replicated((len(self._layout.groups), FORKS_A_CALL), np.int32)
        program = partial(fork_lanes, layout=self._layout, mesh=self._decoder.mesh)
        return self._lower_edit(program, state, ForkCopies(lanes, lanes, pages, pages))

    def lower_block_copies(self, state: DeviceState) -> jax.stages.Lowered:
        """A few dozen blocks at a time."""
        pages = self._replicated((len(self._layout.groups), COPIES_A_CALL), np.int32)
        program = partial(copy_state_blocks, layout=self._layout, mesh=self._decoder.mesh)
        return self._lower_edit(program, state, BlockCopies(pages, pages))

    def lower_table_rows(self, state: DeviceState) -> jax.stages.Lowered:
        """Whole table rows of a few lanes at a time."""
        widths = (group.table_width for group in self._layout.groups)
        rows = tuple(self._replicated((TABLE_ROWS_A_CALL, width), np.int32) for width in widths)
        return self._lower_edit(
            install_table_rows, state, TableRows(self._replicated((TABLE_ROWS_A_CALL,), np.int32), rows)
        )

    def lower_prefix_tokens(self, state: DeviceState) -> jax.stages.Lowered:
        """Some tokens of one lane at a time."""
        tokens = self._replicated((PREFIX_TOKENS_A_CALL,), np.int32)
        prefix = PrefixTokens(self._replicated((), np.int32), self._replicated((), np.bool_), tokens, tokens)
        return self._lower_edit(count_prefix, state, prefix)

    def _lower_edit(self, program: Callable[..., DeviceState], state: DeviceState, change: Any) -> jax.stages.Lowered:
        return self._lower(program, (state, change), donate=0, outputs=_shardings(state))

    def _lower(
        self, program: Callable[..., Any], arguments: tuple[Any, ...], donate: int, outputs: Any
    ) -> jax.stages.Lowered:
        with jax.default_matmul_precision(self._precision):
            return jax.jit(program, donate_argnums=donate, out_shardings=outputs).lower(*arguments)

    def _replicated(self, shape: tuple[int, ...], dtype: type) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=self._sharding())

    def _sharding(self) -> jax.sharding.NamedSharding:
        return named(self._decoder.mesh, REPLICATED)


@dataclasses.dataclass(frozen=True)
class Programs:
    """Every program of an engine, compiled; what changes the state between steps is in the order of ``StepPlan``."""

    block_copies: Any
    table_rows: Any
    lane_setup: Any
    prefix_tokens: Any
    forks: Any
    steps: dict[Bucket, jax.stages.Compiled]

    @property
    def num_programs(self) -> int:
        """Compiled programs: one a bucket and five that change the state between steps."""
        return len(self.steps) + 5

    @classmethod
    def compile(
        cls,
        factory: ProgramFactory,
        formats: Sequence[BatchFormat],
        arguments: tuple[ModelParameters, DeviceState],
        progress: Progress,
    ) -> Programs:
        """Compiles all programs, a few at a time; ``progress`` is told of each as it is done."""
        parameters, state = arguments
        edits: dict[str, Callable[[DeviceState], jax.stages.Lowered]] = {
            "block_copies": factory.lower_block_copies,
            "table_rows": factory.lower_table_rows,
            "lane_setup": factory.lower_lane_setup,
            "prefix_tokens": factory.lower_prefix_tokens,
            "forks": factory.lower_forks,
        }
        lower: dict[Any, Callable[[], jax.stages.Lowered]] = {
            f.bucket: partial(factory.lower_step, f, parameters, state) for f in formats
        }
        lower |= {name: partial(edit, state) for name, edit in edits.items()}
        compiled: dict[Any, jax.stages.Compiled] = {}
        with _compile_pool() as pool:
            jobs = {pool.submit(lambda build: build().compile(), build): name for name, build in lower.items()}
            for job in concurrent.futures.as_completed(jobs):
                compiled[jobs[job]] = job.result()
                progress(f"compiled {str(jobs[job]).replace('_', ' ')}", len(compiled), len(jobs))
        return cls(**{name: compiled[name] for name in edits}, steps={f.bucket: compiled[f.bucket] for f in formats})


def _compile_pool() -> concurrent.futures.ThreadPoolExecutor:
    previous = threading.stack_size(COMPILE_STACK_BYTES)
    pool = concurrent.futures.ThreadPoolExecutor(COMPILE_THREADS, thread_name_prefix="hkv-compile")
    for _ in range(COMPILE_THREADS):
        # A thread takes the stack size of the moment it starts, so all of them start here.
        pool.submit(threading.get_ident)
    threading.stack_size(previous)
    return pool


def _shardings(state: DeviceState) -> DeviceState:
    return jax.tree.map(lambda array: array.sharding, state)
