"""What an attention kernel costs on a TPU that is not there: read from the compiler's schedule, plus a stated model.

    python tools/tpu_cost.py --kernel windowed --shape gemma-3-27b-tp8 --topology v6e --context 32768 --batch 64
    python tools/tpu_cost.py --kernel paged --q-heads 32 --kv-heads 8 --head-dim 128 --topology v5e --json

Compiles the kernel ahead of time with libtpu (no TPU is touched) in a process of its own, reads the final schedule
from the compiler's dump, and prints what was READ and what is a MODEL. The kernels of jax itself are measured by the
same code: --kernel jax-ragged, --kernel jax-paged, or --peers next to ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hkv_jax.kvcache.format import MAX_BLOCK_SIZE  # noqa: E402
from tools.tpu_costs.cases import CHUNK, SHAPES, Case, Geometry, default_block_size  # noqa: E402
from tools.tpu_costs.chips import topology_named  # noqa: E402
from tools.tpu_costs.kernels import KERNELS  # noqa: E402
from tools.tpu_costs.measure import DoesNotCompile, measure  # noqa: E402
from tools.tpu_costs.report import LEGEND, describe, table  # noqa: E402

PEERS = ("jax-ragged", "jax-paged")
PEER_BLOCK_SIZE = 128
ONE_ROW = ("windowed-prefill", "paged-prefill", "kv-update")
"""Kernels that are modelled for a chunk of one sequence."""
DECODE = ("windowed", "paged", "jax-paged")
BATCH = 64
SMALLEST_BLOCK, LARGEST_HEAD = 8, 512


def main() -> int:
    """Measures one kernel, and the peers if asked."""
    options = _parser().parse_args()
    try:
        case = _case(options)
    except ValueError as error:
        sys.stderr.write(f"tpu_cost: {error}\n")
        return 2
    cases = [case]
    if options.peers:
        cases += [dataclasses.replace(case, kernel=peer, block_size=PEER_BLOCK_SIZE, options={}) for peer in PEERS]
    try:
        costs = [measure(case) for case in cases]
    except ValueError as error:
        sys.stderr.write(f"tpu_cost: {error}\n")
        return 2
    if options.json:
        objects = [
            {"kernel": c.case.kernel, "error": c.reason} if isinstance(c, DoesNotCompile) else c.as_dict()
            for c in costs
        ]
        print(json.dumps(objects if options.peers else objects[0]))
    else:
        print("\n\n".join(describe(cost) for cost in costs))
        if options.peers:
            print("\n" + table(costs))
        print("\n" + LEGEND)
    return 1 if isinstance(costs[0], DoesNotCompile) else 0


def _case(options: argparse.Namespace) -> Case:
    """What is to be measured.

    Raises:
        ValueError: an argument that no kernel takes, or not this one.
    """
    topology = topology_named(options.topology)
    geometry = _geometry(options)
    block = options.block_size or (PEER_BLOCK_SIZE if options.kernel in PEERS else default_block_size(geometry))
    if block & (block - 1) or not SMALLEST_BLOCK <= block <= MAX_BLOCK_SIZE:
        raise ValueError(f"--block-size {block} must be a power of two from {SMALLEST_BLOCK} to {MAX_BLOCK_SIZE}")
    batch = options.batch or (1 if options.kernel in ONE_ROW else BATCH)
    chunk = options.chunk or (CHUNK if options.kernel in ONE_ROW else 1)
    if options.kernel in ONE_ROW and batch > 1:
        raise ValueError(f"--batch {batch}: {options.kernel} is modelled for a chunk of one sequence; leave it out")
    if options.kernel in DECODE and chunk > 1:
        raise ValueError(f"--chunk {chunk}: {options.kernel} decodes, one token a sequence; leave it out")
    return Case(options.kernel, geometry, topology, block, options.context, batch, chunk, _tiles(options))


def _tiles(options: argparse.Namespace) -> dict[str, int]:
    """``--options``.

    Raises:
        ValueError: they are no JSON object of integers, or the kernel takes none.
    """
    try:
        tiles = json.loads(options.options)
    except json.JSONDecodeError as error:
        raise ValueError(f"--options {options.options!r} is not JSON: {error}") from error
    if not isinstance(tiles, dict) or not all(type(size) is int and size > 0 for size in tiles.values()):
        raise ValueError(f"--options {options.options!r} must be an object of positive integers")
    if tiles and not options.kernel.endswith("-prefill"):
        raise ValueError(f"--options: {options.kernel} takes none; pallas_kernels/tiles.toml overrides its sizes")
    return tiles


def _geometry(options: argparse.Namespace) -> Geometry:
    """The named shape with what was given by hand laid over it.

    Raises:
        ValueError: neither a name nor the heads, or heads that do not divide.
    """
    given = {
        name: getattr(options, name)
        for name in ("q_heads", "kv_heads", "head_dim", "window", "dtype")
        if getattr(options, name) is not None
    }
    if options.sinks:
        given["sinks"] = True
    if options.shape:
        geometry = dataclasses.replace(SHAPES[options.shape], **given)
    elif {"q_heads", "kv_heads", "head_dim"} <= given.keys():
        geometry = Geometry(**given)
    else:
        raise ValueError("give --shape, or --q-heads, --kv-heads and --head-dim")
    if geometry.head_dim > LARGEST_HEAD:
        raise ValueError(f"--head-dim {geometry.head_dim} must be at most {LARGEST_HEAD}")
    if geometry.q_heads % geometry.kv_heads:
        raise ValueError(f"--q-heads {geometry.q_heads} must be a multiple of --kv-heads {geometry.kv_heads}")
    if options.kernel.startswith("windowed") and geometry.window is None:
        raise ValueError("a windowed kernel needs --window or a shape that has one")
    if options.kernel.startswith("paged"):
        if options.window is not None:
            raise ValueError("--window: a paged kernel reads the whole context; leave it out")
        geometry = dataclasses.replace(geometry, window=None)
    return geometry


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=list(KERNELS), required=True)
    parser.add_argument("--shape", choices=list(SHAPES), help="a model's layer as one chip sees it")
    parser.add_argument("--topology", default="v6e", help="v5e, v5p, v6e (the default) or tpu7x, or a slice: v6e:2x4")
    parser.add_argument("--context", type=_positive, default=32768, help="tokens each sequence has (default: 32768)")
    parser.add_argument("--batch", type=_positive, help=f"sequences (default: {BATCH}; 1 for prefill and kv-update)")
    parser.add_argument("--chunk", type=_positive, help=f"new tokens, of prefill and kv-update (default: {CHUNK})")
    parser.add_argument("--block-size", type=_positive, help="tokens a page (default: what the engine would choose)")
    parser.add_argument("--q-heads", type=_positive, help="query heads of one chip")
    parser.add_argument("--kv-heads", type=_positive, help="key/value heads of one chip")
    parser.add_argument("--head-dim", type=_positive, help=f"elements of a head, at most {LARGEST_HEAD}")
    parser.add_argument("--window", type=_positive, help="tokens; a token sees itself and window - 1 before it")
    parser.add_argument("--sinks", action="store_true", help="a learned score a query head")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "int8"), help="of K and V")
    parser.add_argument("--options", default="{}", help="tile sizes that a kernel takes, as JSON: '{\"queries\": 256}'")
    parser.add_argument("--peers", action="store_true", help="also measure the kernels of jax on the same shape")
    parser.add_argument("--json", action="store_true", help="one object (a list with --peers)")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
