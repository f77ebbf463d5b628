"""Times the forms in which XLA can compute what a step is made of, beside the form that was chosen.

Run as `.venv/bin/python tools/bench_forms.py [--json]`. Times are CPU time of this process pinned to one core, the
least of several rounds, so that a busy machine disturbs them little. Shapes are those of Gemma 3 270M in bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hkv_jax.kvcache.format import KVFormat, PageLayout
from hkv_jax.model.kv_arena import write_kv
from hkv_jax.model.matmul import cpu_has_tiles, project, project_to_vocabulary
from hkv_jax.model.vocabulary import argmax, top_k
from hkv_jax.model.xla_attention import AttentionInputs, AttentionSpec, StepRows, paged_attention
from pallas_kernels.scales import NewKV

ROUNDS, REPEATS = 5, 5
HIDDEN, VOCABULARY, MLP = 640, 262_144, 2048
HEADS, HEAD_DIM, WINDOW, BLOCK = 4, 256, 512, 32
NUM_PAGES = 4096


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of CPU time a call, and its temporary bytes; ``chosen`` marks the form the runtime uses here."""

    what: str
    form: str
    milliseconds: float
    temporary_bytes: int
    chosen: bool


def main() -> None:
    """Measures every form and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--core", type=int, default=0, help="the core to run on (default 0)")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {arguments.core})
    if not arguments.json:
        print(f"CPU with AMX bf16: {'yes' if cpu_has_tiles() else 'no'}; jax {jax.__version__}\n")
        print("| what | form | ms | temporary MB | |\n|---|---|---|---|---|")
    for timing in measurements():
        if arguments.json:
            print(json.dumps(dataclasses.asdict(timing)), flush=True)
        else:
            mark = "chosen" if timing.chosen else ""
            temporary = f"{timing.temporary_bytes / 1e6:.1f}"
            print(f"| {timing.what} | {timing.form} | {timing.milliseconds:.3f} | {temporary} | {mark} |", flush=True)


def measurements() -> Iterator[Timing]:
    """Every form of every operation, in the order of the table."""
    yield from products()
    yield from vocabulary_products()
    yield from reductions()
    yield from writes()
    yield from decode_attention()


def products() -> Iterator[Timing]:
    """The seven weight matrices of six layers."""
    shapes = [(1024, HIDDEN), (256, HIDDEN), (256, HIDDEN), (HIDDEN, 1024), (MLP, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP)]
    weights = [_bf16(*shape) for _ in range(6) for shape in shapes]

    def chain(form: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
        def run(weights: list[jax.Array], x: jax.Array) -> jax.Array:
            # Each product depends on the one before, as layers do.
            total = jnp.float32(0)
            for weight in weights:
                total = form(jnp.resize(x, (x.shape[0], weight.shape[1])) + total.astype(x.dtype), weight).ravel()[0]
            return total

        return run

    for rows in (1, 8, 16, 128):
        x = _bf16(rows, HIDDEN)
        for name, form in (("plain", _plain), ("16 chunks", _chunked), ("ours", lambda a, w: project(a, w, "cpu"))):
            yield _time(f"6 layers' products, {rows} rows", name, chain(form), weights, x)


def vocabulary_products() -> Iterator[Timing]:
    """Hidden states by the embedding, to logits and their argmax."""
    embedding = _bf16(VOCABULARY, HIDDEN)
    for rows in (1, 8, 16):
        x = _bf16(rows, HIDDEN)
        for name, form in (("plain", _plain), ("ours", lambda a, w: project_to_vocabulary(a, w, "cpu"))):
            yield _time(f"logits and argmax, {rows} rows", name, lambda e, x, f=form: argmax(f(x, e)), embedding, x)


def reductions() -> Iterator[Timing]:
    """Argmax and top-k over the vocabulary."""
    for rows in (1, 16):
        logits = jnp.asarray(_rng().standard_normal((rows, VOCABULARY), dtype=np.float32))
        yield _time(f"argmax, {rows} rows", "flat", lambda x: jnp.argmax(x, axis=-1), logits)
        yield _time(f"argmax, {rows} rows", "ours", argmax, logits)
        yield _time(f"top 64, {rows} rows", "flat", lambda x: lax.top_k(x, 64), logits)
        yield _time(f"top 64, {rows} rows", "ours", lambda x: top_k(x, 64), logits)


def writes() -> Iterator[Timing]:
    """Eight tokens' keys and values of one layer into a donated arena of 134 MB."""
    fmt = KVFormat(PageLayout.ROWS, BLOCK, 1, HEAD_DIM, 2, 1)
    slots = jnp.arange(8, dtype=jnp.int32) * 1000
    keys = _bf16(8, 1, HEAD_DIM)
    for name, dtype in (("bfloat16 arena", jnp.bfloat16), ("ours (uint16 arena)", jnp.uint16)):
        arena = jnp.zeros((1, NUM_PAGES * fmt.rows_per_page, HEAD_DIM), dtype)
        yield _time_donated("write 8 tokens", name, lambda a: write_kv(a, fmt, 0, slots, NewKV(keys, keys)), arena)


def decode_attention() -> Iterator[Timing]:
    """One layer, eight rows: a window costs the same at any context, a global layer follows the live context."""
    fmt = KVFormat(PageLayout.ROWS, BLOCK, 1, HEAD_DIM, 2, 1)
    arena = jnp.asarray(_rng().integers(0x3F00, 0x3F80, (1, NUM_PAGES * fmt.rows_per_page, HEAD_DIM)).astype(np.uint16))
    for window in (WINDOW, None):
        width = -(-(window - 1) // BLOCK) + 1 if window else 4096
        spec = AttentionSpec(fmt, window, width, HEAD_DIM**-0.5, None, jnp.dtype(jnp.bfloat16))
        tables = jnp.asarray(_rng().integers(0, NUM_PAGES, (8, width)).astype(np.int32))
        what = f"decode attention, {f'window {window}' if window else 'global'}, 8 rows"
        for context in (100, 1_000, 10_000, 100_000):
            inputs = _decode_inputs(context, tables)
            yield _time(what, f"context {context:,} (ours)", partial(_attend, spec), arena, inputs)


def _attend(spec: AttentionSpec, arena: jax.Array, inputs: AttentionInputs) -> jax.Array:
    return paged_attention(spec, inputs._replace(arena=arena), has_prefill=False)


def _decode_inputs(context: int, tables: jax.Array) -> AttentionInputs:
    index = jnp.arange(9, dtype=jnp.int32)
    rows = StepRows(
        index[:8], jnp.full(8, context, jnp.int32), jnp.zeros(8, jnp.int32), index, jnp.int32(8), jnp.int32(8)
    )
    keys = _bf16(8, 1, HEAD_DIM)
    return AttentionInputs(_bf16(8, HEADS, HEAD_DIM), keys, keys, jnp.zeros(()), jnp.int32(0), tables, rows, None)


def _plain(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("tk,nk->tn", x, weight, preferred_element_type=jnp.float32)


def _chunked(x: jax.Array, weight: jax.Array) -> jax.Array:
    chunks = weight.reshape(16, -1, weight.shape[1])
    return jnp.einsum("tk,cnk->ctn", x, chunks, preferred_element_type=jnp.float32).transpose(1, 0, 2)


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _bf16(*shape: int) -> jax.Array:
    return jnp.asarray((_rng().standard_normal(shape, dtype=np.float32) * 0.02).astype(jnp.bfloat16))


def _time(what: str, form: str, function: Callable[..., Any], *arguments: Any) -> Timing:
    program = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(program(*arguments))

    def once() -> None:
        jax.block_until_ready(program(*arguments))

    return _timing(what, form, program, once)


def _time_donated(what: str, form: str, function: Callable[..., Any], donated: jax.Array) -> Timing:
    program = jax.jit(function, donate_argnums=0).lower(donated).compile()
    held = [program(donated)]

    def once() -> None:
        held[0] = jax.block_until_ready(program(held[0]))

    return _timing(what, form, program, once)


def _timing(what: str, form: str, program: jax.stages.Compiled, once: Callable[[], None]) -> Timing:
    least = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(REPEATS):
            once()
        least = min(least, (time.process_time() - start) / REPEATS)
    analysis = program.memory_analysis()
    temporary = 0 if analysis is None else int(analysis.temp_size_in_bytes)
    return Timing(what, form, least * 1e3, temporary, "ours" in form)


if __name__ == "__main__":
    main()
