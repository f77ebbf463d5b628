"""The engine on the device, over a real (tiny) checkpoint: nothing compiles after warm-up, and blocks leave with the
window.

Everything here runs what users run, ``build_engine``; parity of its numbers is ``tests/golden``'s business.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import jax
import numpy as np
import pytest

from hkv_jax.config import EngineConfig
from hkv_jax.engine import runner
from hkv_jax.engine.device_state import allocate_state
from hkv_jax.engine.factory import EngineParts, build_engine
from hkv_jax.engine.request import Request
from hkv_jax.sampling_params import SamplingParams

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
COMPILED = "/jax/core/compile/backend_compile_duration"
LONG = 4000


def build(**options: object) -> EngineParts:
    return build_engine(EngineConfig(model=GOLDEN / "gemma3_text", dtype="float32", **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def parts() -> EngineParts:
    return build(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=256, kv_cache_memory="1MiB")


def random_request(number: int, rng: random.Random) -> Request:
    """A request with any mixture of options."""
    prompt = [rng.randrange(3, 250) for _ in range(rng.choice((1, 2, 5, 17, 40, 90)))]
    pick = rng.random
    params = SamplingParams(
        max_tokens=rng.randrange(1, 9),
        min_tokens=rng.choice((0, 0, 1)),
        temperature=rng.choice((0.0, 0.7, 1.3)),
        top_k=rng.choice((0, 1, 5, 100)),
        top_p=rng.choice((1.0, 0.9, 0.3)),
        min_p=rng.choice((0.0, 0.1)),
        repetition_penalty=rng.choice((1.0, 1.2)),
        presence_penalty=rng.choice((0.0, 0.5)),
        frequency_penalty=rng.choice((0.0, -0.5)),
        logit_bias={7: 3.0, 9: -100.0} if pick() < 0.2 else {},
        seed=number,
        n=rng.choice((1, 1, 1, 2, 3)),
        stop_token_ids=(11, 12) if pick() < 0.3 else (),
        ignore_eos=pick() < 0.5,
        logprobs=rng.choice((None, None, 0, 5)),
        prompt_logprobs=rng.choice((None, None, None, 2)),
    )
    return Request.create(f"r{number}", prompt, params, eos_token_ids=(1,))


def test_mixed_requests_compile_nothing_after_warm_up(parts: EngineParts) -> None:
    engine, rng = parts.engine, random.Random(0)
    compiled: list[str] = []
    watching = True

    def note(event: str, *_: object, **__: object) -> None:
        if watching and event == COMPILED:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    jax.jit(lambda x: x + 1)(np.arange(3))
    assert compiled, "the listener sees compilations"
    compiled.clear()
    finished: set[str] = set()
    for number in range(500):
        engine.add(random_request(number, rng))
        if rng.random() < 0.05:
            engine.abort(f"r{rng.randrange(number + 1)}")
        while engine.scheduler.num_waiting > 6:
            finished.update(e.sequence.request.request_id for e in engine.step() if e.finish_reason)
    while engine.has_work:
        finished.update(e.sequence.request.request_id for e in engine.step() if e.finish_reason)
    watching = False
    assert compiled == []
    assert len(finished) > 400
    assert all(pool.used_blocks == 0 for pool in engine.cache.stats())


def test_a_program_names_the_argument_that_changed(parts: EngineParts) -> None:
    formats = parts.engine.buckets.all
    program = parts.programs.steps[formats[0].bucket]
    device = parts.engine._runner
    ints, floats = np.zeros(formats[0].num_ints + 1, np.int32), np.zeros(formats[0].num_floats, np.float32)
    with pytest.raises(TypeError, match="ints"):
        program(device._parameters, device._state, ints, floats)  # type: ignore[attr-defined]


def test_one_program_a_bucket(parts: EngineParts) -> None:
    assert parts.programs.num_programs == len(parts.engine.buckets.all) + 5
    # Rows 1, 2, 4 and tokens 16, 32: few shapes, counted here so that their growth is noticed.
    assert [str(f.bucket) for f in parts.engine.buckets.all] == [
        "decode 1 tokens x 1 rows",
        "decode 2 tokens x 2 rows",
        "decode 4 tokens x 4 rows",
        "prefill 16 tokens x 4 rows",
        "prefill 32 tokens x 4 rows",
    ]


def test_a_failed_step_starts_over_without_room_for_two_arenas(
    parts: EngineParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, steps = parts.engine, parts.programs.steps

    def tokens() -> list[int]:
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        engine.add(Request.create("a", range(3, 40), params))
        found = []
        while engine.has_work:
            found += [event.token_id for event in engine.step()]
        return found

    expected = tokens()
    bucket = engine.buckets.decode[0].bucket
    program, num_calls, freed = steps[bucket], itertools.count(1), []

    class Unreadable:
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise RuntimeError("the device says no")

    def fails_once(*arguments: object) -> object:
        state, outputs = program(*arguments)
        return state, outputs._replace(tokens=Unreadable()) if next(num_calls) == 3 else outputs

    def allocate(*arguments: object) -> object:
        freed.append(all(array.is_deleted() for array in jax.tree.leaves(engine._runner._state)))  # type: ignore[attr-defined]
        return allocate_state(*arguments)  # type: ignore[arg-type]

    monkeypatch.setitem(steps, bucket, fails_once)
    monkeypatch.setattr(runner, "allocate_state", allocate)
    assert tokens() == expected
    assert freed == [True]


@pytest.mark.slow
def test_sliding_blocks_leave_with_the_window() -> None:
    parts = build(max_num_seqs=1, max_num_batched_tokens=64, max_model_len=LONG + 128, kv_cache_memory="4MiB")
    engine = parts.engine
    prompt = [int(token) for token in np.random.default_rng(0).integers(3, 250, 100)]
    engine.add(Request.create("long", prompt, SamplingParams(max_tokens=LONG, temperature=0, ignore_eos=True)))
    pools = {group.spec.name: group for group in parts.layout.groups}
    window, block = pools["sliding"].spec.window, pools["sliding"].format.block_size
    assert window == 16
    most_decoding = -(-(window - 1) // block) + 1
    num_tokens, held = 0, []
    while engine.has_work:
        num_tokens += len(engine.step())
        if num_tokens:
            held.append({pool.name: pool.used_blocks for pool in engine.cache.stats()})
    assert num_tokens == LONG
    assert max(step["sliding"] for step in held) == most_decoding
    peaks = {pool.name: pool.peak_used_blocks * pool.block_bytes for pool in engine.cache.stats()}
    # The last token is drawn and never written.
    last = len(prompt) + LONG - 1
    predicted = {name: group.blocks_of_sequence(last) * group.format.block_bytes for name, group in pools.items()}
    assert peaks["global"] == predicted["global"]
    assert most_decoding * pools["sliding"].format.block_bytes <= peaks["sliding"] <= predicted["sliding"]
    released = {pool.name: pool.released_early_blocks for pool in engine.cache.stats()}
    assert released["global"] == 0
    assert released["sliding"] >= LONG // block - most_decoding


def test_memory_is_given_back() -> None:
    before = sum(array.nbytes for array in jax.live_arrays())
    parts = build(max_num_seqs=1, max_num_batched_tokens=16, max_model_len=64, kv_cache_memory="8MiB")
    assert sum(array.nbytes for array in jax.live_arrays()) > before + 2**20
    del parts
    assert sum(array.nbytes for array in jax.live_arrays()) <= before


@pytest.mark.slow
def test_chips_share_the_vocabulary_and_the_rows_without_a_trace() -> None:
    found: list[dict[str, tuple[list[int], list[float]]]] = []
    for chips in (1, 2):
        options = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "max_model_len": 128, "kv_cache_memory": "1MiB"}
        engine, rng = build(tensor_parallel_size=chips, **options).engine, random.Random(1)
        for number in range(16):
            engine.add(random_request(number, rng))
        drawn: dict[str, tuple[list[int], list[float]]] = {}
        while engine.has_work:
            for event in engine.step():
                name = f"{event.sequence.request.request_id}/{event.sequence.sample}"
                tokens, logprobs = drawn.setdefault(name, ([], []))
                tokens.append(event.token_id)
                for logprob in (event.logprob, *(event.prompt_logprobs or ())):
                    if logprob is not None and logprob.logprob is not None:
                        logprobs.append(logprob.logprob)
        found.append(drawn)
    alone, together = found
    assert {name: tokens for name, (tokens, _) in together.items()} == {n: t for n, (t, _) in alone.items()}
    assert sum(bool(logprobs) for _, logprobs in alone.values()) > 3
    for name, (_, logprobs) in alone.items():
        np.testing.assert_allclose(together[name][1], logprobs, atol=1e-4)
