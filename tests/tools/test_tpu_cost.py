"""The cost tool: what it reads from a schedule, what it lays over it, and one kernel through all of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tools import tpu_compile_all
from tools.tpu_costs.cases import SHAPES, Case, Geometry, default_block_size
from tools.tpu_costs.measured import Compiled, Cost, Work
from tools.tpu_costs.our_kernels import windowed_decode_work
from tools.tpu_costs.our_prefill import _units, plan
from tools.tpu_costs.schedule import UNITS, Copy, Loop, Schedule, parse_bundles
from tools.tpu_costs.suite import cases, few_cases, pool_bytes
from tools.tpu_costs.trips import Counts, first_fetch, largest

ROOT = Path(__file__).resolve().parents[2]

BUNDLES = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 0 } /* Start region 1 */
   0x1   :  { %3 = dma.hbm_to_smem /*hbm=*/%s0, /*size_in_granules=*/16, /*smem=*/%s4 }
   0x2 LB: > { %p5 = scmp.ne.s32.totalorder %s6, 0 } /* Start region 2 */
   0x3   : > { %7 = sbr.rel (%p5) target = $region5 }
   0x4   :  {}
   0x5   : > { %8 = shalt.err (!%p9) /* BoundsCheck of %s1 for %4 = dma.hbm_to_vmem, /*size_in_granules=*/9 */ }
   0x6   : > { %9 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s2, /*size_in_granules=*/64, /*vmem=*/%s3 } /* End region 3 */
   0x7 PF: > { %v1 = vld [vmem:[%s1] sm:$0xff] } /* Start/End empty region 5 :: Start region 6 */
   0x8 LB: >> { %v2 = vadd.f32 %v1, %v1  ;;  %s2 = sadd.s32 1, %s1 } /* Start region 7 */
   0x9   : > { %11 = sbr.rel (!%p12) target = $region7 }
   0xa   :  {}
   0xb   : >> { %v3 = vmul.f32 %v2, %v2 }
   0xc   : > { %13 = sbr.rel (!%p14) target = $region2 }
   0xd   :  { %s9 = smov 1 }
"""


@pytest.fixture
def schedule() -> Schedule:
    code, copies = parse_bundles(BUNDLES, 14)
    slots = np.zeros((14, len(UNITS)), np.int64)
    slots[8, UNITS.index("VALU")] = 2
    slots[11, UNITS.index("VALU")] = 4
    return Schedule("a kernel", code, slots, np.array([2, 2, 4, 2, 1, 3, 3, 2, 2, 2]), copies, 1024, 64)


def test_loops_are_nested_and_keep_their_delay_slots(schedule: Schedule) -> None:
    outer = largest(schedule.code.loops)
    inner = largest(outer.loops)
    assert (outer.start, outer.end, outer.depth) == (2, 13, 1)
    # The branch back is marked as outside, and what follows it in its delay slots as inside.
    assert (inner.start, inner.end, inner.depth) == (8, 12, 2)
    assert outer.own_bundles == 7
    assert len(schedule.code.loops) == len(outer.loops) == 1


def test_copies_are_those_issued_not_those_quoted_by_checks(schedule: Schedule) -> None:
    assert [(copy.bundle, copy.way, copy.granules) for copy in schedule.copies] == [
        (1, "hbm_to_smem", 16),
        (6, "hbm_to_vmem", 64),
    ]


def test_branches_forward_skip_and_backward_do_not(schedule: Schedule) -> None:
    outer = largest(schedule.code.loops)
    assert outer.skips == [(4, 7)]
    assert first_fetch(schedule, outer, least_bundles=2) == (4, 7)
    assert first_fetch(schedule, outer) is None


def test_counts_multiply_through_nested_loops(schedule: Schedule) -> None:
    outer = largest(schedule.code.loops)
    counts = Counts.of(schedule)
    counts.repeat(outer, 10)
    counts.repeat(outer.loops[0], 5)
    counts.rarely((4, 7), 0.1)
    assert counts.bundles == pytest.approx(3 + 4 * 10 + 3 * 1 + 4 * 50)
    taken = 50 * (2 + 4)
    assert counts.utilisation()[UNITS.index("VALU")] == pytest.approx(taken / 4 / counts.bundles)


def test_time_is_the_larger_of_bytes_and_bundles(schedule: Schedule) -> None:
    case = Case("windowed", SHAPES["gemma-3-1b"], "v6e:2x2", 32)
    counts = Counts.of(schedule)
    hot = largest(schedule.code.loops)
    bound_by_memory = Cost(case, schedule, Compiled(1.0, 0, 0), Work(counts, 1640e9, 1640e9 / 2, 1640e9 / 4, (hot,)))
    assert bound_by_memory.seconds == pytest.approx(1.0)
    assert bound_by_memory.floor_ratio == pytest.approx(2.0)
    assert bound_by_memory.floor_ratio_with_fill == pytest.approx(2.5)
    assert bound_by_memory.binds == "HBM"
    work = dataclasses.replace(bound_by_memory.work, step_bytes=1.0)
    bound_by_bundles = dataclasses.replace(bound_by_memory, work=work)
    assert bound_by_bundles.seconds == pytest.approx(14 / 1.75e9)
    assert bound_by_bundles.binds == "latency (VALU 11%)"


def test_all_sequences_of_a_windowed_program_count() -> None:
    """Also where their code is nearly all of the grid's, and the last one's is no longer than another's."""
    waits, clears, settles = Loop(30, 33, 2), Loop(100, 103, 2), Loop(980, 983, 2)
    attend, idle = (50, 960), (961, 975)
    # Loops run for short rows only, and each has a branch around it.
    skips = [(12, 985), (11, 27), (28, 34), attend, (98, 105), (200, 500), (600, 900), idle, (978, 984)]
    grid = Loop(10, 990, 1, [waits, clears, settles], skips)
    copies = tuple(Copy(bundle, "hbm_to_vmem", 0) for bundle in (15, 450, 850, 965))
    slots, capacity = np.zeros((1000, len(UNITS)), np.int64), np.ones(len(UNITS), np.int64)
    schedule = Schedule("a kernel", Loop(0, 1000, 0, [grid]), slots, capacity, copies, 0, 0)
    case = Case("windowed", SHAPES["gemma-4-31b-local"], "v5e:2x2", 64, batch=4)
    counts = windowed_decode_work(case, schedule).counts.of_bundle
    # Two programs of two sequences.
    assert counts[[300, 700, 10, 40]].tolist() == [2, 2, 2, 2]
    assert counts[[0, 15, 101, 965]].tolist() == [1, 1, 0, 0]


def test_cases_of_integers_are_named_and_their_pools_have_scales() -> None:
    named = {name: case for name, case in cases("v6e:2x2").items() if case.geometry.dtype == "int8"}
    assert {case.kernel for case in named.values()} == {
        "windowed", "paged", "windowed-prefill", "paged-prefill", "kv-update",
    }  # fmt: skip
    assert all(name.endswith(", int8") for name in named)
    assert any(name in few_cases("v5e:2x2") for name in named)
    # gpt-oss: 4,096 pages of 8 planes, in blocks of 32 where rows are bytes and not of 16.
    of_gpt = named["windowed, gpt-oss-20b, int8"]
    assert (of_gpt.block_size, pool_bytes(of_gpt)) == (32, 4096 * 8 * 32 * (128 + 4))
    assert pool_bytes(cases("v6e:2x2")["windowed, gpt-oss-20b"]) == 4096 * 8 * 16 * 128 * 2


def test_a_chunk_visits_no_more_keys_than_its_windows_need() -> None:
    case = Case("windowed-prefill", SHAPES["gemma-3-27b-tp8"], "v6e:2x2", 64, batch=1, chunk=2048)
    units = list(_units(case, plan(case)))
    assert [unit.blocks for unit in units] == [16, 12, 8, 4, 0, 0, 0, 0]
    assert [sum(unit.tiles) for unit in units] == [5] * 8
    assert all((unit.plain_goes, unit.edges) == (1, 2) for unit in units)


def test_blocks_are_those_the_engine_would_choose() -> None:
    assert default_block_size(Geometry(4, 2, 128, 1024)) == 64
    assert default_block_size(Geometry(64, 8, 64, 128)) == 16
    assert default_block_size(Geometry(32, 8, 128)) == 64


def test_a_case_survives_the_way_to_another_process() -> None:
    case = Case("paged", SHAPES["gpt-oss-20b"], "v5e:2x2", 64, options={"queries": 128})
    assert Case.from_json(case.to_json()) == case


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "windowed"], "give --shape, or --q-heads, --kv-heads and --head-dim"),
        (["--kernel", "windowed", "--shape", "llama-3.1-8b"], "a windowed kernel needs --window"),
        (["--kernel", "paged", "--shape", "gemma-3-1b", "--q-heads", "3", "--kv-heads", "2"], "--q-heads 3 must be a"),
        (["--kernel", "paged", "--shape", "gemma-3-1b", "--topology", "v3:2x2"], "no figures for 'v3'"),
        (
            ["--kernel", "paged", "--shape", "gemma-3-1b", "--topology", "v6e:3x3"],
            "a slice of v6e is hosts of two by two chips",
        ),
        (["--kernel", "paged", "--shape", "gemma-3-1b", "--topology", "v5p:2x2"], "such as v5p:2x2x1"),
        (["--kernel", "windowed", "--shape", "gemma-3-1b", "--window", "0"], "argument --window: 0 is not at least 1"),
        (["--kernel", "paged", "--shape", "gemma-3-1b", "--window", "64"], "--window: a paged kernel reads the whole"),
        (
            ["--kernel", "paged", "--shape", "gemma-3-1b", "--block-size", "48"],
            "--block-size 48 must be a power",
        ),
        (["--kernel", "paged", "--shape", "gemma-3-1b", "--head-dim", "600"], "--head-dim 600 must be at most 512"),
        (["--kernel", "paged", "--shape", "gemma-3-1b", "--chunk", "16"], "--chunk 16: paged decodes"),
        (["--kernel", "kv-update", "--shape", "gemma-3-1b", "--batch", "2"], "--batch 2: kv-update is modelled for"),
        (["--kernel", "paged", "--shape", "gemma-3-1b", "--options", "{x"], "--options '{x' is not JSON"),
        (["--kernel", "paged", "--shape", "gemma-3-1b", "--options", '{"keys": 1}'], "--options: paged takes none"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], message: str) -> None:
    run = subprocess.run(
        [sys.executable, "tools/tpu_cost.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert message in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--only", "nosuch"],
            "--only 'nosuch': no kernel has this in its name; there are\n  windowed, gemma-3-27b-tp8",
        ),
        (["--processes", "0"], "--processes 0 must be at least 1"),
    ],
)
def test_what_cannot_be_compiled_is_said(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tpu_compile_all.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        tpu_compile_all.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="NOT CHECKED: libtpu is not installed")
def test_a_kernel_is_measured_beside_those_of_jax() -> None:
    arguments = ["--kernel", "windowed", "--shape", "gemma-3-1b", "--topology", "v6e", "--peers", "--json"]
    run = subprocess.run(
        [sys.executable, "tools/tpu_cost.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    ours, *peers = json.loads(run.stdout.splitlines()[-1])
    assert {"bundles_per_sequence", "bytes_per_step", "floor_bytes", "floor_ratio", "floor_ratio_with_fill"} <= set(
        ours
    )
    assert {"binds", "compile_seconds"} <= set(ours)
    assert set(ours["utilisation"]) == set(UNITS)
    # Sixty times the window lies before it; what is read is the window and what its blocks round it up to.
    assert 1.0 < ours["bytes_per_step"] / ours["floor_bytes"] < 1.15
    for peer in peers:
        assert peer["bytes_per_step"] > 10 * ours["bytes_per_step"]
        assert peer["bundles_per_sequence"] > 10 * ours["bundles_per_sequence"]
