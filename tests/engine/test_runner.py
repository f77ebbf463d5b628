"""What the runner asks of its programs before a step, and in which order; none of them is run here."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hkv_jax.engine import runner as runner_module
from hkv_jax.engine.batch_format import Bucket
from hkv_jax.engine.buckets import Buckets
from hkv_jax.engine.device_state import COPIES_A_CALL
from hkv_jax.engine.plan import BlockCopy, DecodeRows, LaneTables, StepPlan
from hkv_jax.engine.programs import Programs
from hkv_jax.engine.request import Request, Sequence
from hkv_jax.engine.runner import Runner
from hkv_jax.kvcache.format import NO_SLOT
from hkv_jax.kvcache.manager import Fork
from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.outputs import PrefixHit
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.sharding import make_mesh
from hkv_jax.testing.unbuilt_engine import UnbuiltEngine, hybrid_spec

LANES, VOCABULARY = 6, 96
NO_DECODES = DecodeRows((), np.zeros(0, np.int32), np.zeros(0, np.int32))


class Recorded:
    """Programs that change nothing; ``calls`` are (name of the program, what it was given)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        edits = [field.name for field in dataclasses.fields(Programs) if field.name != "steps"]
        step = {Bucket(1, 1, False): lambda _parameters, state, *_: (self._note("step", None, state), None)}
        self.programs = Programs(**{name: self._edit(name) for name in edits}, steps=step)  # type: ignore[arg-type]

    def _edit(self, name: str) -> Any:
        return lambda state, change: self._note(name, change, state)

    def _note(self, name: str, change: Any, state: Any) -> Any:
        self.calls.append((name, change))
        return state

    def of(self, name: str) -> list[Any]:
        return [change for called, change in self.calls if called == name]


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture
def runner(recorded: Recorded) -> Runner:
    spec = hybrid_spec(3, vocab_size=VOCABULARY)
    engine = UnbuiltEngine(spec, make_mesh(1), jnp.dtype(jnp.float32), 1 << 18, max_num_seqs=LANES)
    buckets = Buckets(LANES, 16, engine.layout.block_sizes)
    return Runner(recorded.programs, (), engine.state, buckets, VOCABULARY)  # type: ignore[arg-type]


@dataclasses.dataclass
class OneRow:
    """As much of a batch as the runner looks at."""

    ints: object = None
    floats: object = None

    @property
    def format(self) -> OneRow:
        return self

    @property
    def bucket(self) -> Bucket:
        return Bucket(1, 1, False)


def dispatch(runner: Runner, **changes: Any) -> None:
    runner.dispatch(StepPlan(NO_DECODES, (), **changes), OneRow())  # type: ignore[arg-type]


def admitted(prompt: list[int], outputs: list[int], start: int, **params: Any) -> Sequence:
    sequence = Sequence.create(Request.create("r", prompt, SamplingParams(**params)), 0, 0, 4096)
    sequence.lane, sequence.output_token_ids = 2, outputs
    sequence.prefix = PrefixUse(start, start, PrefixHit.RESIDENT, 0)
    return sequence


def tables(runner: Runner, lane: int) -> LaneTables:
    return LaneTables(lane, tuple(np.full(t.shape[1], lane + 10, np.int32) for t in runner._shapes.tables))


def test_a_plan_is_carried_out_in_order(runner: Runner, recorded: Recorded) -> None:
    dispatch(
        runner,
        copies=(BlockCopy(0, 1, 2),),
        table_rows=(tables(runner, 1),),
        admitted=(admitted([1, 2, 3, 4], [], 2, presence_penalty=1.0, logit_bias={5: 1.0}),),
        forks=(Fork(1, 3, ()),),
    )
    order = ["block_copies", "table_rows", "lane_setup", "prefix_tokens", "forks", "step"]
    assert [name for name, _ in recorded.calls] == order


def test_copies_keep_their_order_across_groups(runner: Runner, recorded: Recorded) -> None:
    # A call copies within the first group first, so going back to it needs another call.
    copies = tuple(BlockCopy(group, 10 + place, 20 + place) for place, group in enumerate((0, 0, 1, 0, 1, 1)))
    dispatch(runner, copies=copies)
    made = [
        [
            (group, int(pages), int(call.target_pages[group, place]))
            for group in range(2)
            for place, pages in enumerate(call.source_pages[group])
            if call.target_pages[group, place] != NO_SLOT
        ]
        for call in recorded.of("block_copies")
    ]
    assert made == [[(0, 10, 20), (0, 11, 21), (1, 12, 22)], [(0, 13, 23), (1, 14, 24), (1, 15, 25)]]


def test_many_copies_are_several_calls(runner: Runner, recorded: Recorded) -> None:
    count = 2 * COPIES_A_CALL + 1
    dispatch(runner, copies=tuple(BlockCopy(1, page, 1000 + page) for page in range(count)))
    calls = recorded.of("block_copies")
    assert len(calls) == 3
    sources = np.concatenate([call.source_pages[1][call.target_pages[1] != NO_SLOT] for call in calls])
    assert sources.tolist() == list(range(count))


def test_table_rows_come_a_few_at_a_time(runner: Runner, recorded: Recorded) -> None:
    dispatch(runner, table_rows=tuple(tables(runner, lane) for lane in (5, 0, 2, 1, 4)))
    first, second = recorded.of("table_rows")
    assert first.lanes.tolist() == [5, 0, 2, 1]
    assert second.lanes.tolist() == [4, LANES, LANES, LANES]
    for group in range(2):
        assert first.rows[group][:, 0].tolist() == [15, 10, 12, 11]
        assert second.rows[group][0].tolist() == [14] * runner._shapes.tables[group].shape[1]


def test_penalties_know_the_tokens_that_are_not_run(
    runner: Runner, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "PREFIX_TOKENS_A_CALL", 3)
    sequence = admitted([7, 8, 7, 9, 7, 5], [3, 3, 4, 3, 6], start=10, repetition_penalty=1.5)
    dispatch(runner, admitted=(sequence,))
    first, second = recorded.of("prefix_tokens")
    assert (int(first.lane), bool(first.empty), bool(second.empty)) == (2, True, False)
    assert first.prompt_tokens.tolist() == [5, 7, 8]
    assert second.prompt_tokens.tolist() == [9, VOCABULARY, VOCABULARY]
    # The token at position 10 runs in the lane and is counted there.
    assert first.output_tokens.tolist() == [3, 3, 4]
    assert second.output_tokens.tolist() == [3, VOCABULARY, VOCABULARY]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.5, "logit_bias": {3: 1.0}}])
def test_without_penalties_nobody_counts(runner: Runner, recorded: Recorded, params: dict[str, Any]) -> None:
    dispatch(runner, admitted=(admitted([1, 2, 3], [], 2, **params),))
    assert recorded.of("prefix_tokens") == []


@pytest.mark.parametrize("use", [None, PrefixUse(0, 0, PrefixHit.MISS, 0)])
def test_a_sequence_from_its_first_token_on_is_counted_as_it_runs(
    runner: Runner, recorded: Recorded, use: PrefixUse | None
) -> None:
    sequence = admitted([1, 2, 3], [], 2, presence_penalty=1.0)
    sequence.prefix = use
    dispatch(runner, admitted=(sequence,))
    assert recorded.of("prefix_tokens") == []


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, False),
        ({"temperature": 0.0, "logit_bias": {1: 1.0}}, False),
        ({"repetition_penalty": 0.9}, True),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
    ],
)
def test_what_a_penalty_is(params: dict[str, Any], expected: bool) -> None:
    assert SamplingParams(**params).has_penalties == expected
