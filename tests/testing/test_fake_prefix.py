"""The fake device on cached prefixes: what it lets pass, and each way to use a prefix wrongly that it must see.

Batches are made by hand. One global layer stands above two of three sliding layers of window 5; all blocks have 4
tokens, so a whole tail is one block, and a run from s on is exact in the layers 0, 1, 3 from s, s + 4, s + 8 on, and in
its output from s + 12 on.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from hkv_jax.engine.batch import StepBatch
from hkv_jax.engine.batch_format import NO_TOKEN
from hkv_jax.engine.buckets import Buckets
from hkv_jax.engine.plan import BlockCopy, DecodeRows, LaneTables, StepPlan
from hkv_jax.engine.request import Request, Sequence
from hkv_jax.kvcache.format import NO_SLOT
from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.outputs import PrefixHit
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.spec import KVGroupSpec, LayerKind
from hkv_jax.testing.fake_arena import carried_errors
from hkv_jax.testing.fake_engine import FakeEngineConfig
from hkv_jax.testing.fake_runner import FakeRunner

SIZE, LANES = 4, 4
GROUPS = (
    KVGroupSpec("global", LayerKind.GLOBAL, None, 1, 8, (2,)),
    KVGroupSpec("sliding", LayerKind.SLIDING, 5, 1, 8, (0, 1, 3)),
)
CONFIG = FakeEngineConfig(
    groups=GROUPS, block_size=(("global", SIZE), ("sliding", SIZE)), max_num_seqs=LANES, max_model_len=48
)
TOKENS = np.arange(3, 51, dtype=np.int32)

Pages = dict[int, int]  # block number → page, of one lane and group


class Device:
    """A fake device and the tables of its lanes, as a host would keep them."""

    def __init__(self) -> None:
        self.layout = CONFIG.layout()
        buckets = Buckets(LANES, 32, self.layout.block_sizes)
        self.format = buckets.prefill[-1]
        self.runner = FakeRunner(self.layout, buckets, LANES, CONFIG.vocab_size)
        # Of the slabs the groups own at start.
        self.free = [
            [group.page(group.initial_slabs[0] * group.blocks_per_slab + block) for block in range(group.num_blocks)]
            for group in self.layout.groups
        ]
        self.pages: list[tuple[Pages, Pages]] = [({}, {}) for _ in range(LANES)]

    def admit(self, lane: int, use: PrefixUse, loaded: tuple[Pages, Pages] = ({}, {})) -> StepPlan:
        """A plan that opens ``lane`` over cached blocks."""
        sequence = Sequence.create(Request.create(f"{lane}", TOKENS.tolist(), SamplingParams()), 0, 0, 49)
        sequence.lane, sequence.prefix = lane, use
        self.pages[lane] = (dict(loaded[0]), dict(loaded[1]))
        rows = []
        for group, pages in zip(self.layout.groups, loaded, strict=True):
            row = np.zeros(group.table_width, np.int32)
            for number, page in pages.items():
                row[number % len(row)] = page
            rows.append(row)
        tables = (LaneTables(lane, tuple(rows)),) if any(loaded) else ()
        return dataclasses.replace(NOTHING, admitted=(sequence,), table_rows=tables)

    def run(
        self,
        lane: int,
        start: int,
        end: int,
        plan: StepPlan | None = None,
        written_from: int = 0,
        context: int = 0,
        draws: bool = False,
    ) -> None:
        """One row: tokens [start, end) of TOKENS; global K/V below ``written_from`` is not written."""
        ints, floats = np.zeros(self.format.num_ints, np.int32), np.zeros(self.format.num_floats, np.float32)
        fields, count = self.format.unpack(ints, floats), end - start
        fields.tokens[:count], fields.positions[:count] = TOKENS[start:end], np.arange(start, end)
        fields.targets[:] = fields.sample_tokens[:] = NO_TOKEN
        fields.query_starts[1:] = count
        fields.start_positions[0], fields.context_starts[0], fields.prompt_lens[0] = start, context, len(TOKENS)
        fields.lanes[:] = LANES
        fields.lanes[0], fields.num_rows[0], fields.num_decode_rows[0] = lane, 1, count == 1
        if draws:
            fields.sample_tokens[0] = count - 1
        for group in range(2):
            fields.table_updates[group][:, 0] = LANES
            slots, updates = self._slots(group, lane, start, end)
            if group == 0:
                slots[: max(0, written_from - start)] = NO_SLOT
            fields.slots[group][:] = NO_SLOT
            fields.slots[group][:count] = slots
            if updates:
                fields.table_updates[group][: len(updates)] = updates
        batch = StepBatch(self.format, ints, floats, fields, wants_logprobs=False, wants_prompt_logprobs=False)
        self.runner.dispatch(plan or NOTHING, batch)

    def _slots(self, group: int, lane: int, start: int, end: int) -> tuple[NDArray, list[tuple[int, int, int]]]:
        pages, updates = self.pages[lane][group], []
        width = self.layout.groups[group].table_width
        for number in range(start // SIZE, -(-end // SIZE)):
            if number not in pages:
                pages[number] = self.free[group].pop()
                if group == 0 or number >= -(-end // SIZE) - width:
                    updates.append((lane, number % width, pages[number]))
        slots = [pages[position // SIZE] * SIZE + position % SIZE for position in range(start, end)]
        return np.array(slots, np.int32), updates


NOTHING = StepPlan(DecodeRows((), np.zeros(0, np.int32), np.zeros(0, np.int32)), ())
COLD = PrefixUse(0, 0, PrefixHit.MISS, 0)


@pytest.fixture
def device() -> Device:
    """Lane 0 has run 24 tokens from the first on."""
    device = Device()
    device.run(0, 0, 24, device.admit(0, COLD))
    return device


def first_blocks(device: Device, count: int) -> Pages:
    """Global blocks of lane 0."""
    return {number: device.pages[0][0][number] for number in range(count)}


def rebuild(device: Device, start: int, matched: int = 20, lane: int = 1) -> None:
    """Opens a lane over the global blocks of lane 0 and computes its sliding ones from ``start`` up to ``matched``."""
    use = PrefixUse(start, matched, PrefixHit.REBUILD, start)
    plan = device.admit(lane, use, (first_blocks(device, matched // SIZE), {}))
    device.run(lane, start, matched, plan, written_from=matched, context=start)


def test_errors_are_carried_by_sliding_layers() -> None:
    assert carried_errors(CONFIG.layout()) == ([[8], [0, 4, 8]], 12)


def test_a_rebuild_of_the_receptive_length_is_exact(device: Device) -> None:
    rebuild(device, 8)
    device.run(1, 20, 23, context=8, draws=True)
    device.run(1, 23, 24, context=8, draws=True)


def test_a_chunk_may_straddle_the_end_of_the_prefix(device: Device) -> None:
    plan = device.admit(1, PrefixUse(8, 20, PrefixHit.REBUILD, 8), (first_blocks(device, 5), {}))
    device.run(1, 8, 15, plan, written_from=20, context=8)
    device.run(1, 15, 26, written_from=20, context=8, draws=True)


def test_a_rebuild_one_block_short_is_seen_when_it_draws(device: Device) -> None:
    rebuild(device, 12)
    with pytest.raises(AssertionError, match="drawn from a polluted"):
        device.run(1, 20, 23, context=12, draws=True)


def test_a_draw_inside_the_zone_is_seen(device: Device) -> None:
    plan = device.admit(1, PrefixUse(8, 20, PrefixHit.REBUILD, 8), (first_blocks(device, 5), {}))
    with pytest.raises(AssertionError, match="drawn from a polluted"):
        device.run(1, 8, 20, plan, written_from=20, context=8, draws=True)


def test_global_blocks_of_polluted_tokens_are_seen(device: Device) -> None:
    # 12 tokens are exact where the global layer stands only from 20 on.
    plan = device.admit(1, PrefixUse(12, 16, PrefixHit.REBUILD, 12), (first_blocks(device, 4), {}))
    with pytest.raises(AssertionError, match="polluted token is written"):
        device.run(1, 12, 20, plan, written_from=16, context=12)


def test_what_is_cached_must_not_be_written(device: Device) -> None:
    plan = device.admit(1, PrefixUse(8, 20, PrefixHit.REBUILD, 8), (first_blocks(device, 5), {}))
    with pytest.raises(AssertionError, match="position 19 is cached and is written"):
        device.run(1, 8, 20, plan, written_from=19, context=8)


def test_the_exact_tail_of_a_rebuild_serves_others(device: Device) -> None:
    rebuild(device, 8)
    tail = {4: device.pages[1][1][4]}
    plan = device.admit(2, PrefixUse(20, 20, PrefixHit.RESIDENT, 0), (first_blocks(device, 5), tail))
    device.run(2, 20, 27, plan, written_from=20, draws=True)


@pytest.mark.parametrize("block", [2, 3])
def test_a_polluted_block_serves_nobody(device: Device, block: int) -> None:
    rebuild(device, 8)
    start = (block + 1) * SIZE
    tail = {block: device.pages[1][1][block]}
    plan = device.admit(2, PrefixUse(start, start, PrefixHit.RESIDENT, 0), (first_blocks(device, block + 1), tail))
    with pytest.raises(AssertionError, match="holds the K/V of something else"):
        device.run(2, start, start + 3, plan)


def test_another_run_s_polluted_block_does_not_serve_in_a_zone_of_the_same_start(device: Device) -> None:
    rebuild(device, 8)
    plan = device.admit(2, PrefixUse(8, 20, PrefixHit.REBUILD, 8), (first_blocks(device, 5), {}))
    device.run(2, 8, 16, plan, written_from=20, context=8)
    width = device.layout.groups[1].table_width
    device.runner._tables[1][2, 3 % width] = device.pages[1][1][3]
    with pytest.raises(AssertionError, match="holds the K/V of something else"):
        device.run(2, 16, 20, written_from=20, context=8)


def test_a_tail_that_is_not_loaded_is_seen(device: Device) -> None:
    plan = device.admit(1, PrefixUse(20, 20, PrefixHit.RESIDENT, 0), (first_blocks(device, 5), {}))
    with pytest.raises(AssertionError, match="holds the K/V of something else"):
        device.run(1, 20, 23, plan)


def test_a_prefix_one_block_too_long_is_seen(device: Device) -> None:
    pages = device.pages[0]
    plan = device.admit(1, PrefixUse(28, 28, PrefixHit.RESIDENT, 0), ({**pages[0], 6: 99}, {6: pages[1][5]}))
    with pytest.raises(AssertionError, match="holds the K/V of something else"):
        device.run(1, 28, 30, plan)


def test_a_context_must_be_the_sequence_s(device: Device) -> None:
    plan = device.admit(1, PrefixUse(8, 20, PrefixHit.REBUILD, 8), (first_blocks(device, 5), {}))
    with pytest.raises(AssertionError, match="a context start"):
        device.run(1, 8, 20, plan, written_from=20, context=4)


def test_a_sequence_runs_from_its_start_on(device: Device) -> None:
    plan = device.admit(1, PrefixUse(8, 20, PrefixHit.REBUILD, 8), (first_blocks(device, 5), {}))
    with pytest.raises(AssertionError, match="token 12 of lane 1, which has run 8"):
        device.run(1, 12, 20, plan, written_from=20, context=8)


def test_copies_and_table_rows_come_before_the_step(device: Device) -> None:
    moved = {}
    copies = []
    for number, page in first_blocks(device, 5).items():
        moved[number] = device.free[0].pop()
        copies.append(BlockCopy(0, page, moved[number]))
    tail = device.free[1].pop()
    copies.append(BlockCopy(1, device.pages[0][1][4], tail))
    plan = device.admit(2, PrefixUse(20, 20, PrefixHit.RESIDENT, 0), (moved, {4: tail}))
    device.run(2, 20, 27, dataclasses.replace(plan, copies=tuple(copies)), draws=True)
    plan = device.admit(3, PrefixUse(20, 20, PrefixHit.RESIDENT, 0), (moved, {4: device.free[1].pop()}))
    with pytest.raises(AssertionError, match="holds the K/V of something else"):
        device.run(3, 20, 27, plan)
