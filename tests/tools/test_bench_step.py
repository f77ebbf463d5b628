"""The step benchmark: peers take turns in processes of their own, and the report is made of what they did.

No time is asserted.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from hkv_jax.config import DEMO_MODEL
from tools import bench_step
from tools.step_bench import environments, machine
from tools.step_bench.points import GOALS, Outcome, Point, same_tokens
from tools.step_bench.report import CoreResults, ModelBytes, Report
from tools.step_bench.workers import PeerSpec, Worker, WorkerFailedError, environment
from tools.step_bench.write_gguf import gguf_name, read_tensors, widen

ALL_GOALS = [
    "decode1@128",
    "decode1@1024",
    "decode1@4096",
    "decode8@128",
    "decode8@1024",
    "decode16@128",
    "decode16@1024",
    "prefill@128",
    "prefill@1024",
    "prefill@4096",
]


class NumberedPrompts(bench_step.Prompts):
    """Prompts that say which story they are."""

    def __init__(self) -> None:
        """No tokenizer."""

    def __call__(self, length: int, story: int) -> list[int]:
        return [story] * length


@pytest.fixture(scope="module")
def model() -> Path:
    return DEMO_MODEL


def fake(name: str, folder: Path, **options: Any) -> PeerSpec:
    module = "tests.tools.fake_step_peer"
    return PeerSpec(name, Path(sys.executable), module, folder / "notes", {"name": name, **options})


def start(spec: PeerSpec, folder: Path) -> Worker:
    return Worker(spec, machine.available_cores()[:1], folder)


def test_every_goal_is_at_a_point_that_can_be_asked_for() -> None:
    assert [Point.parse(name) for name in ALL_GOALS] == list(GOALS)
    assert [str(point) for point in GOALS] == ALL_GOALS


@pytest.mark.parametrize("text", ["decode@128", "decode0@128", "prefill@0", "prefill8@128", "decode8", "128", ""])
def test_what_is_no_point_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no point"):
        Point.parse(text)


def test_peers_take_turns(tmp_path: Path) -> None:
    with start(fake("a", tmp_path), tmp_path) as one, start(fake("b", tmp_path), tmp_path) as two:
        outcomes = bench_step.measure(Point(3, 7), [one, two], NumberedPrompts(), rounds=2, steps=2)
        assert one.versions == {"a": "1"}
    turn = bench_step.UNTIMED_STEPS + 2
    turns = (["a step"] * turn + ["b step"] * turn) * 2
    notes = (tmp_path / "notes").read_text(encoding="utf-8").splitlines()
    assert notes == ["a start 3x7", "b start 3x7", *turns, "a stop", "b stop"]
    for outcome in outcomes.values():
        assert [len(seconds) for seconds in outcome.rounds] == [2, 2]
        assert [len(seconds) for seconds in outcome.cpu_rounds] == [2, 2]
        assert outcome.tokens == list(range(100, 100 + 2 * turn))


def test_each_round_prefills_another_text(tmp_path: Path) -> None:
    with start(fake("a", tmp_path), tmp_path) as worker:
        outcomes = bench_step.measure(Point(0, 5), [worker], NumberedPrompts(), rounds=3, steps=9)
    assert outcomes["a"].tokens == [1, 2, 3]
    assert [len(seconds) for seconds in outcomes["a"].rounds] == [1, 1, 1]


def test_a_worker_that_dies_is_quoted(tmp_path: Path) -> None:
    with (
        start(fake("a", tmp_path, dies_at=3), tmp_path) as worker,
        pytest.raises(WorkerFailedError, match=r"a ended with status 1(.|\n)*out of luck"),
    ):
        bench_step.measure(Point(1, 5), [worker], NumberedPrompts(), rounds=2, steps=2)
    with pytest.raises(WorkerFailedError, match="no such model"):
        start(fake("a", tmp_path, no_model=True), tmp_path)


def test_settings_for_this_machine_do_not_reach_the_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OMP_WAIT_POLICY", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HOME", "here")
    found = environment([4, 5], tmp_path)
    assert found["HOME"] == "here"
    assert found["OMP_NUM_THREADS"] == "2"
    assert [name for name in found if name.startswith(("OPENBLAS", "MKL"))] == []
    assert "OMP_WAIT_POLICY" not in found
    assert found["HKV_JAX_COMPILATION_CACHE"] != environment([4], tmp_path)["HKV_JAX_COMPILATION_CACHE"]


def report_of(outcomes: dict[str, Outcome], point: Point) -> Report:
    model_bytes = ModelBytes(weights=1_000_000_000, groups=((1000, None), (5000, 512)))
    result = CoreResults([0], share_hardware=False, bandwidth=[9.0, 10.0], outcomes={point: outcomes})
    cpu = {"model": "A CPU", "flags": ["avx512_bf16"], "missing": ["amx_bf16"]}
    return Report("a-model", model_bytes, cpu, 0.5, [*outcomes], versions={"jax": "1"}, results=[result])


def test_the_table_compares_with_the_goals() -> None:
    outcomes = {
        "hkv-jax": Outcome([[0.9, 0.2, 0.1], [0.2], [0.4]], tokens=[5, 6, 7], others=[0.5, 0.0]),
        "transformers": Outcome([[0.4]], tokens=[5, 6, 8]),
        "llama.cpp f16": Outcome([[0.25]], tokens=[5, 9, 7]),
        "llama.cpp bf16": Outcome([[0.21]], tokens=[5, 6, 8]),
    }
    report = report_of(outcomes, Point(1, 1024))
    text = report.markdown()
    # 1 GB of weights, and K/V of 1024 and 512 tokens, in 0.2 s of a memory that gives 10 GB/s.
    row = [cell.strip() for cell in next(line for line in text.splitlines() if "decode1" in line).strip("|").split("|")]
    assert row == ["decode1@1024", "5.0", "2.5", "4.0", "4.8", "2.00 (1.8)", "**1.05** (1.1, missed)", "50%"]
    assert "A CPU, with avx512_bf16; without amx_bf16." in text
    assert "hkv-jax 2 of 3, llama.cpp f16 1 of 3, llama.cpp bf16 3 of 3" in text
    assert "**The machine was busy; do not quote these figures.** Other processes took 25% of the cores" in text
    assert "more than 10% in 1 of 2 turns" in text
    figures = report.json()["cores"][0]["points"]["decode1@1024"]
    assert figures["to_llama"] == pytest.approx(1.05)
    assert figures["step_bytes"] == 1_000_000_000 + 1000 * 1024 + 5000 * 512
    assert figures["peers"]["hkv-jax"]["rounds"] == [[0.9, 0.2, 0.1], [0.2], [0.4]]


def test_a_peer_that_is_missing_is_told() -> None:
    report = report_of({"hkv-jax": Outcome([[0.1]]), "transformers": Outcome([[0.1]], others=[0.0])}, Point(0, 128))
    report.missing["llama.cpp"] = "no compiler"
    text = report.markdown()
    assert "llama.cpp: not measured: no compiler" in text
    assert "busy" not in text
    row = [cell.strip() for cell in next(line for line in text.splitlines() if "prefill" in line).strip("|").split("|")]
    assert row == ["prefill@128", "1280", "1280", "**1.00** (1.3, missed)", "-", "-"]


def test_tokens_count_until_they_differ_but_prefills_are_apart() -> None:
    assert same_tokens(Point(1, 5), [1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert same_tokens(Point(1, 5), [1, 2, 3], [1, 2, 3]) == 3
    assert same_tokens(Point(0, 5), [1, 2, 3, 4], [1, 2, 9, 4]) == 3


def test_every_tensor_of_gemma_3_has_a_name_of_its_own_in_llama_cpp(model: Path) -> None:
    names = list(load_file(model / "model.safetensors"))
    renamed = [gguf_name(name) for name in names]
    assert len(set(renamed)) == len(names)
    assert gguf_name("model.layers.11.pre_feedforward_layernorm.weight") == "blk.11.ffn_norm.weight"
    for unknown in ("lm_head.weight", "model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.gate.weight"):
        with pytest.raises(ValueError, match=unknown):
            gguf_name(unknown)


def test_weights_are_read_word_for_word(model: Path) -> None:
    expected = load_file(model / "model.safetensors")
    tensors = read_tensors(model / "model.safetensors")
    assert {*tensors} == {*expected}
    for name, words in tensors.items():
        np.testing.assert_array_equal(words.view(ml_dtypes.bfloat16), expected[name])
        np.testing.assert_array_equal(widen(words), expected[name].astype(np.float32))


def test_the_log_of_a_build_tells_how_far_it_is_and_what_went_wrong(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Collecting x\n  [1/140] cc -Werror=implicit-int\n  [2/140] cc b\n", encoding="utf-8")
    assert environments.compiled(log) == "2/140"
    log.write_text("-- looking\n  x.c:1: fatal error: omp.h: No such file\n  error: failed\n", encoding="utf-8")
    assert environments.compiled(log) == ""
    assert environments.first_error(log) == "x.c:1: fatal error: omp.h: No such file"


def test_all_that_ran_on_the_cores_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counters = tmp_path / "stat"
    monkeypatch.setattr(machine, "COUNTERS", counters)
    assert machine.busy_seconds([0]) is None
    lines = ["cpu 9 9 9 9 9 9 9 9", "cpu0 1 2 3 9000 9000 4 5 6 7 8", "cpu1 10 0 0 0 0 0 0 0 0 0", "intr 5", ""]
    counters.write_text("\n".join(lines), encoding="utf-8")
    tick = os.sysconf("SC_CLK_TCK")
    assert machine.busy_seconds([0]) == pytest.approx(21 / tick)
    assert machine.busy_seconds([0, 1]) == pytest.approx(31 / tick)
    assert machine.busy_seconds([2]) is None


def test_one_core_shares_nothing_with_itself() -> None:
    assert not machine.share_hardware(machine.available_cores()[:1])


@pytest.mark.slow
def test_our_peer_yields_the_tokens_of_its_engine(model: Path) -> None:
    from tools.step_bench.peer_hkv import HkvPeer

    options = {"dtype": "float32", "max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 128}
    peer = HkvPeer(model, 1, options)
    prompts = [list(range(100, 140)), list(range(200, 240))]
    peer.start(prompts)
    tokens = [peer.step() for _ in range(6)]
    peer.stop()
    expected: list[int] = []
    for _ in tokens:
        expected.append(peer.prefill(prompts[0] + expected))
    assert tokens == expected
    assert len(set(tokens)) > 1
    peer.start(prompts[1:])
    token = peer.step()
    peer.stop()
    assert token == peer.prefill(prompts[1])


def test_the_engine_gets_room_for_every_point(model: Path) -> None:
    command = ["--points", "decode16@1024", "prefill@4096", "--engine", "max_num_batched_tokens=256"]
    options = bench_step._parser().parse_args([*command, "--model", str(model)])
    chosen = bench_step._engine_options(options)
    assert chosen["max_model_len"] > 4096
    assert chosen["max_num_seqs"] == 16
    assert chosen["max_num_batched_tokens"] == "256"
    report = bench_step._empty_report(model)
    total = sum(value.nbytes for value in load_file(model / "model.safetensors").values())
    assert report.bytes.weights == total
    assert dataclasses.asdict(report.bytes)["groups"] == ((2 * 2 * 64 * 2, None), (10 * 2 * 64 * 2, 32))
