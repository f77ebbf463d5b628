"""An engine whose steps also hand out the logits of every token: what parity tests compare with a reference.

Owns: building it over a checkpoint folder and remembering logits by request and position. The step's own program does
the work; the probe only adds an output. Must never: change what a step computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from hkv_jax.engine.batch import StepBatch
from hkv_jax.engine.batch_format import BatchFormat, Bucket
from hkv_jax.engine.blueprint import Blueprint
from hkv_jax.engine.buckets import Buckets
from hkv_jax.engine.engine import Engine
from hkv_jax.engine.plan import StepPlan
from hkv_jax.engine.programs import ProgramFactory, Programs
from hkv_jax.engine.request import Request
from hkv_jax.engine.runner import Runner, StepHandle
from hkv_jax.engine.scheduler_config import SchedulerConfig
from hkv_jax.engine.step import StepOutputs, StepProgram
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.families import TensorNames, read_model_spec
from hkv_jax.kvcache.format import PageLayout
from hkv_jax.kvcache.layout import KVLayout, LayoutRequest, plan_layout
from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.model.checkpoint import Checkpoint
from hkv_jax.model.parameters import load_parameters
from hkv_jax.model.transformer import ModelParameters
from hkv_jax.outputs import TokenLogprob
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.sharding import make_mesh
from hkv_jax.spec import ModelSpec

BUDGET_BYTES = 1 << 22
"""Of one device: room for every sequence at once."""


@dataclasses.dataclass(frozen=True)
class ProbeOptions:
    """What decides the programs of a probe; hashable, so that probes of equal options share them.

    ``spec_changes`` are (field, value) pairs put into the ``ModelSpec``: damage, to see a test fail.
    ``sliding_block_size`` is that of sliding groups, where it differs; ``budget_bytes`` is the KV cache of one device.
    """

    folder: Path
    block_size: int = 16
    sliding_block_size: int | None = None
    budget_bytes: int = BUDGET_BYTES
    tensor_parallel: int = 1
    partition: str = "moving"
    page_layout: PageLayout = PageLayout.ROWS
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 80
    max_model_len: int = 112
    spec_changes: tuple[tuple[str, Any], ...] = ()


class _ProbeProgram(StepProgram):
    """A step that also returns f32[T, V], the logits of every token."""

    def _draw(self, parameters: Any, state: Any, fields: Any, hidden: Any) -> Any:
        state, outputs = super()._draw(parameters, state, fields, hidden)
        return state, (outputs, self.decoder.embedder(parameters).logits(hidden))


class _ProbeFactory(ProgramFactory):
    step_program = _ProbeProgram


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """What is made once for equal options."""

    blueprint: Blueprint
    parameters: ModelParameters
    buckets: Buckets
    programs: Programs


class _ProbeRunner(Runner):
    """Runs every plan in the two probe programs and keeps their logits."""

    def __init__(self, compiled: _Compiled) -> None:
        blueprint = compiled.blueprint
        super().__init__(
            compiled.programs, compiled.parameters, blueprint.state, compiled.buckets, blueprint.spec.vocab_size
        )
        self.logits: dict[tuple[str, int], NDArray[np.float32]] = {}

    def dispatch(self, plan: StepPlan, batch: StepBatch) -> StepHandle:
        handle = super().dispatch(plan, batch)
        outputs, logits = handle._outputs  # type: ignore[misc]
        rows = np.asarray(logits)
        decode = plan.decode
        token = 0
        for sequence, position in zip(decode.sequences, decode.positions.tolist(), strict=True):
            self.logits[sequence.request.request_id, position] = rows[token]
            token += 1
        for chunk in plan.chunks:
            for position in range(chunk.start, chunk.end):
                self.logits[chunk.sequence.request.request_id, position] = rows[token]
                token += 1
        return StepHandle(StepOutputs(*outputs), batch)


class Probe:
    """A small engine over a checkpoint, in float32, run to the end of its requests.

    What one call of ``generate`` leaves in the cache the next one may find. By request id, ``prefix_uses`` says what it
    found, ``prompt_logprobs`` those that were asked for.
    """

    def __init__(
        self, options: ProbeOptions, max_prefill_chunk: int, crowded: bool = False, spare_slabs: int = 0
    ) -> None:
        """Loads and compiles, or takes what a probe of equal ``options`` has compiled.

        Args:
            options: decide the programs.
            max_prefill_chunk: most tokens of one sequence in a step.
            crowded: the pools own just the slabs that serve one sequence of ``max_model_len``, so that others must wait
                or give way.
            spare_slabs: as many more for each group, where they are crowded.
        """
        compiled = _compile(options)
        self._runner = _ProbeRunner(compiled)
        blueprint = compiled.blueprint
        layout = _least_slabs(blueprint.layout, spare_slabs) if crowded else blueprint.layout
        config = SchedulerConfig(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_prefill_chunk=max_prefill_chunk,
            max_model_len=options.max_model_len,
            vocab_size=blueprint.spec.vocab_size,
        )
        self._engine = Engine.over(layout, config, self._runner)
        self.scheduler, self.cache = self._engine.scheduler, self._engine.cache
        self.prefix_uses: dict[str, PrefixUse] = {}
        self.prompt_logprobs: dict[str, tuple[TokenLogprob, ...]] = {}

    def generate(self, prompts: Mapping[str, list[int]], params: SamplingParams) -> dict[str, list[int]]:
        """Runs requests by id, in the order given, and returns their tokens.

        Invariants are checked after every step.
        """
        outputs: dict[str, list[int]] = {name: [] for name in prompts}
        for name, prompt in prompts.items():
            self._engine.add(Request.create(name, prompt, params))
        while self._engine.has_work:
            for event in self._engine.step():
                self._take(event, outputs[event.sequence.request.request_id])
            self.cache.check_invariants()
        return outputs

    def _take(self, event: TokenEvent, outputs: list[int]) -> None:
        sequence = event.sequence
        name = sequence.request.request_id
        if not outputs and sequence.first_prefix is not None:
            self.prefix_uses[name] = sequence.first_prefix
        if event.prompt_logprobs is not None:
            self.prompt_logprobs[name] = event.prompt_logprobs
        outputs.append(event.token_id)

    def logits(self, name: str, num_tokens: int, first: int = 0) -> NDArray[np.float32]:
        """f32[num_tokens - first, V] of the tokens of a request from position ``first`` on, as last computed."""
        return np.stack([self._runner.logits[name, position] for position in range(first, num_tokens)])

    def keys_values(self, group: int, block: int) -> NDArray[np.float32]:
        """f32[layers, 2, P, K * D]: what a block of a group holds now, in pages of rows on one device."""
        layout = self.cache.layout.groups[group]
        fmt = layout.format
        assert fmt.layout is PageLayout.ROWS, "pages of planes are not read here"
        pages = np.asarray(self._runner._state.arenas[layout.arena]).reshape(-1, fmt.page_elements)
        first = layout.page(block)
        return pages[first : first + fmt.num_layers].reshape(-1, 2, fmt.block_size, fmt.row_elements)


def _least_slabs(layout: KVLayout, spare_slabs: int) -> KVLayout:
    """The same arenas, of which each group owns no more slabs than its floor takes, and a few to spare."""
    groups = [
        dataclasses.replace(g, initial_slabs=g.initial_slabs[: -(-g.floor_blocks // g.blocks_per_slab) + spare_slabs])
        for g in layout.groups
    ]
    return dataclasses.replace(layout, groups=tuple(groups))


# One at a time: a compiled program on CPU is hundreds of memory mappings, and a process may have 65,530 of them.
@lru_cache(maxsize=1)
def _compile(options: ProbeOptions) -> _Compiled:
    spec = dataclasses.replace(read_model_spec(options.folder), **dict(options.spec_changes))
    dtype, mesh = jnp.dtype(jnp.float32), make_mesh(options.tensor_parallel)
    layout = plan_layout(_layout_request(options, spec))
    blueprint = Blueprint(spec, mesh, layout, dtype, dtype, options.max_num_seqs, scanned=False)
    checkpoint = Checkpoint(options.folder)
    names = TensorNames.of_checkpoint(spec, checkpoint.tensors)
    parameters = load_parameters(blueprint.decoder, checkpoint, names, dtype, lambda *_: None)
    buckets = _TwoBuckets(options, layout.block_sizes)
    arguments = (parameters, blueprint.state)
    programs = Programs.compile(blueprint.factory(_ProbeFactory), buckets.all, arguments, lambda *_: None)
    return _Compiled(blueprint, parameters, buckets, programs)


class _TwoBuckets(Buckets):
    """One decode and one prefill bucket: a parity test wants many engines, not many shapes."""

    def __init__(self, options: ProbeOptions, block_sizes: tuple[int, ...]) -> None:
        rows, tokens = options.max_num_seqs, options.max_num_batched_tokens
        self.decode = (BatchFormat(Bucket(rows, rows, False), block_sizes),)
        self.prefill = (BatchFormat(Bucket(tokens, rows, True), block_sizes),)


def _layout_request(options: ProbeOptions, spec: ModelSpec) -> LayoutRequest:
    groups = spec.kv_groups()
    sliding = options.sliding_block_size or options.block_size
    return LayoutRequest(
        groups=groups,
        budget_bytes=options.budget_bytes,
        max_model_len=options.max_model_len,
        config_max_len=spec.max_position,
        expected_average_seq_length=None,
        block_sizes={group.name: sliding if group.window else options.block_size for group in groups},
        partition=options.partition,
        page_layout=options.page_layout,
        itemsize=4,
        tensor_parallel=options.tensor_parallel,
        max_chunk=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
    )
