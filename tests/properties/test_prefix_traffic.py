"""Random interleavings of requests that share prefixes, in pools too small for them: 100,000 steps, and shrinking ones.

The fake device (``hkv_jax.testing.fake_runner``) knows which K/V is exact, which is polluted by a rebuild and whose it
is: every block that a hit brings must hold the right tokens, whatever was evicted, moved, preempted or aborted
meanwhile. Planted mistakes show that it sees them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hkv_jax.engine import prefill
from hkv_jax.engine.prefill import Prefill
from hkv_jax.engine.request import Sequence
from hkv_jax.kvcache import prefix_cache, room
from hkv_jax.kvcache.block_table import BlockTable
from hkv_jax.kvcache.group_cache import GroupCache
from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.kvcache.prefix_cache import PrefixCache
from hkv_jax.kvcache.prefix_match import PrefixPath, PrefixUse
from hkv_jax.kvcache.prefix_tree import Node, PrefixTree
from hkv_jax.kvcache.receptive import receptive_tokens
from hkv_jax.kvcache.token_chain import TokenChain
from hkv_jax.outputs import PrefixHit
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.spec import KVGroupSpec, LayerKind
from hkv_jax.testing.fake_engine import FakeEngineConfig
from hkv_jax.testing.prefix_traffic import PrefixTraffic, TrafficRates

STEPS = 10_000
"""Of each of ten configurations."""

ALL_HITS = frozenset(PrefixHit)


def everywhere(*layers: int) -> KVGroupSpec:
    return KVGroupSpec("global", LayerKind.GLOBAL, None, 1, 8, layers)


def sliding(window: int, *layers: int, name: str = "sliding") -> KVGroupSpec:
    return KVGroupSpec(name, LayerKind.SLIDING, window, 2, 8, layers)


# Three sliding layers of window 5 over blocks of 4: R is 12 tokens.
BASE = FakeEngineConfig(
    groups=(everywhere(2), sliding(5, 0, 1, 3)),
    block_size=(("global", 4), ("sliding", 4)),
    kv_cache_memory=30 * 1024,
    max_model_len=96,
    vocab_size=23,
    max_num_seqs=6,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration, and what its traffic must meet if it is to show anything."""

    config: FakeEngineConfig
    hits: frozenset[PrefixHit] = ALL_HITS
    policy: CachePolicy = dataclasses.field(default_factory=CachePolicy)
    preempts: bool = False
    moves: bool = True


NO_REBUILD = frozenset({PrefixHit.MISS, PrefixHit.RESIDENT, PrefixHit.TRUNCATE})
WITHOUT_A_PART = frozenset({PrefixHit.MISS, PrefixHit.RESIDENT})

CASES = {
    "tiny pools": Case(BASE, preempts=True),
    "roomier pools": Case(dataclasses.replace(BASE, kv_cache_memory=100 * 1024)),
    "many lanes": Case(dataclasses.replace(BASE, max_num_seqs=12, kv_cache_memory=36 * 1024), preempts=True),
    "large global blocks": Case(
        dataclasses.replace(BASE, groups=(everywhere(2), sliding(10, 0, 1)), block_size=(("global", 8), ("sliding", 4)))
    ),
    "small chunks": Case(dataclasses.replace(BASE, max_prefill_chunk=7, max_num_batched_tokens=11), preempts=True),
    "two windows": Case(
        dataclasses.replace(
            BASE,
            groups=(everywhere(2, 5), sliding(5, 0, 3, name="sliding_w5"), sliding(9, 1, 4, name="sliding_w9")),
            block_size=(("global", 8), ("sliding", 4)),
            kv_cache_memory=56 * 1024,
        )
    ),
    "two arenas": Case(dataclasses.replace(BASE, kv_partition="static", kv_cache_memory=40 * 1024), moves=False),
    "no repair": Case(BASE, NO_REBUILD, CachePolicy(tail_repair=False), preempts=True),
    "all global": Case(
        dataclasses.replace(BASE, groups=(everywhere(0, 1),)), WITHOUT_A_PART, preempts=True, moves=False
    ),
    "all sliding": Case(
        dataclasses.replace(BASE, groups=(sliding(5, 0, 1),), kv_cache_memory=20 * 1024), WITHOUT_A_PART, moves=False
    ),
}


@pytest.fixture(autouse=True)
def _short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances that are small beside real prompts are small beside these too.

    Nobody is expected to draw many tokens, so that pools overflow and sequences must give way; and only the last blocks
    of a prompt are worth joining.
    """
    monkeypatch.setattr(room, "GROWTH_TOKENS", 0)
    monkeypatch.setattr(prefill, "BEFORE_END_TOKENS", 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ten_thousand_steps(name: str) -> None:
    case = CASES[name]
    traffic = PrefixTraffic(case.config, seed=sorted(CASES).index(name), policy=case.policy)
    traffic.run(STEPS, full_check_every=100)
    traffic.drain()
    cache = traffic.engine.cache
    assert set(traffic.hits) == case.hits
    assert min(traffic.hits.values()) >= 10, traffic.hits
    assert traffic.num_compared >= 3
    assert cache.prefixes.joins.num_evicted > 100
    assert (cache.num_slabs_moved > 100) == case.moves
    assert traffic.engine.scheduler.num_preemptions > 0 or not case.preempts


def test_without_a_cache_nothing_is_found() -> None:
    traffic = PrefixTraffic(BASE, seed=1, policy=CachePolicy(enabled=False))
    traffic.run(300, full_check_every=1)
    traffic.drain()
    assert set(traffic.hits) == {PrefixHit.MISS}


class PrefixMachine(RuleBasedStateMachine):
    """The same engine under actions that Hypothesis chooses and can take back; every invariant after each."""

    @initialize(name=st.sampled_from(["tiny pools", "small chunks", "two windows", "two arenas", "all sliding"]))
    def begin(self, name: str) -> None:
        self.traffic = PrefixTraffic(CASES[name].config, seed=0)

    @rule(
        document=st.integers(0, 1),
        cut=st.integers(1, 70),
        question=st.lists(st.integers(0, 22), max_size=6),
        max_tokens=st.integers(1, 12),
        samples=st.sampled_from([1, 1, 2]),
    )
    def ask(self, document: int, cut: int, question: list[int], max_tokens: int, samples: int) -> None:
        prompt = [*self.traffic.documents[document][:cut], *question]
        self.traffic.submit(prompt, SamplingParams(max_tokens=max_tokens, seed=cut, n=samples))

    @rule(which=st.integers(0, 30), more=st.lists(st.integers(0, 22), max_size=6))
    def go_on(self, which: int, more: list[int]) -> None:
        conversations = self.traffic.conversations
        if conversations:
            prompt = [*conversations[which % len(conversations)], *more][:90]
            self.traffic.submit(prompt, SamplingParams(max_tokens=5, seed=which))

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.traffic.step()

    @rule()
    def abort(self) -> None:
        self.traffic.abort()

    @rule()
    def stop(self) -> None:
        self.traffic.stop()

    @rule()
    def fail(self) -> None:
        self.traffic.fail()

    @rule(seconds=st.sampled_from([0.3, 0.7, 3.0]))
    def wait(self, seconds: float) -> None:
        self.traffic.now += seconds

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.check()

    def teardown(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.drain()


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = settings(
    max_examples=40, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestPrefixMachine = pytest.mark.slow(TestPrefixMachine)


Plant = Callable[[pytest.MonkeyPatch], None]


def digests_leave_out_a_token(patch: pytest.MonkeyPatch) -> None:
    """Prompts that differ in the last token of a block are taken for equal."""
    honest = TokenChain.append

    def append(self: TokenChain, tokens):  # type: ignore[no-untyped-def]
        tokens = tokens.copy()
        tokens[self.block_size - 1 :: self.block_size] = 0
        honest(self, tokens)

    patch.setattr(TokenChain, "append", append)


def a_hit_leaves_nothing_to_compute(patch: pytest.MonkeyPatch) -> None:
    honest = Prefill.of

    def of(sequence: Sequence, known_end: int, block_size: int) -> Prefill:
        made = honest(sequence, known_end, block_size)
        made.path.limit = known_end // block_size
        return made

    patch.setattr(Prefill, "of", of)


def a_hit_begins_a_block_late(patch: pytest.MonkeyPatch) -> None:
    honest = PrefixPath.choose

    def choose(self: PrefixPath, tree: PrefixTree, rebuild_tokens: int | None) -> PrefixUse:
        use = honest(self, tree, rebuild_tokens)
        if use.hit is PrefixHit.TRUNCATE and use.start + tree.block_size < use.matched:
            start = use.start + tree.block_size
            return dataclasses.replace(use, start=start, context_start=start)
        return use

    patch.setattr(PrefixPath, "choose", choose)


def a_tail_lacks_its_first_block(patch: pytest.MonkeyPatch) -> None:
    honest_tail, honest_live = PrefixTree.tail, GroupCache.first_live

    def tail(self: PrefixTree, node: Node) -> list[list[int]] | None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(GroupCache, "first_live", lambda cache, end: honest_live(cache, end) + 1)
            return honest_tail(self, node)

    patch.setattr(PrefixTree, "tail", tail)


def a_rebuild_begins_a_block_late(patch: pytest.MonkeyPatch) -> None:
    honest = receptive_tokens

    def receptive(groups: list[KVGroupSpec], sizes: list[int]) -> int | None:
        tokens = honest(groups, sizes)
        return None if tokens is None else tokens - max(sizes)

    patch.setattr(prefix_cache, "receptive_tokens", receptive)


def polluted_blocks_are_listed(patch: pytest.MonkeyPatch) -> None:
    honest = PrefixCache.attach

    def attach(self: PrefixCache, lane: int, path: PrefixPath | None, use: PrefixUse) -> None:
        honest(self, lane, path, use)
        self._lanes[lane].exact_blocks = [0] * len(self._groups)

    patch.setattr(PrefixCache, "attach", attach)


def the_block_before_the_exact_tail_is_listed(patch: pytest.MonkeyPatch) -> None:
    honest = PrefixCache.attach

    def attach(self: PrefixCache, lane: int, path: PrefixPath | None, use: PrefixUse) -> None:
        honest(self, lane, path, use)
        exact = self._lanes[lane].exact_blocks
        self._lanes[lane].exact_blocks = [max(0, first - 1) for first in exact]

    patch.setattr(PrefixCache, "attach", attach)


def the_window_is_released_a_block_early(patch: pytest.MonkeyPatch) -> None:
    honest = GroupCache.release_window
    patch.setattr(GroupCache, "release_window", lambda self, lane, start: honest(self, lane, start + self.block_size))


def the_window_is_a_token_short(patch: pytest.MonkeyPatch) -> None:
    honest = BlockTable.__init__
    patch.setattr(BlockTable, "__init__", lambda self, size, window: honest(self, size, window and window - 1))


def a_hit_is_not_pinned(patch: pytest.MonkeyPatch) -> None:
    honest = GroupCache.load

    def load(self: GroupCache, lane: int, start: int, blocks: list[int], cached_end: int) -> None:
        honest(self, lane, start, blocks, cached_end)
        self.pool.release(blocks)

    patch.setattr(GroupCache, "load", load)


def half_written_blocks_are_listed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockTable, "is_whole", lambda self, number: True)


def cached_blocks_are_written_again(patch: pytest.MonkeyPatch) -> None:
    honest = BlockTable.load
    patch.setattr(BlockTable, "load", lambda self, start, blocks, end: honest(self, start, blocks, 0))


SEEN = (
    "holds the K/V of something else|never set|polluted|what a hit would expect|is cached and|P2|not kept"
    "|does not follow"
)


@pytest.mark.parametrize(
    "plant",
    [
        digests_leave_out_a_token,
        a_hit_leaves_nothing_to_compute,
        a_hit_begins_a_block_late,
        a_tail_lacks_its_first_block,
        a_rebuild_begins_a_block_late,
        polluted_blocks_are_listed,
        the_block_before_the_exact_tail_is_listed,
        the_window_is_released_a_block_early,
        the_window_is_a_token_short,
        a_hit_is_not_pinned,
        half_written_blocks_are_listed,
        cached_blocks_are_written_again,
    ],
)
def test_a_planted_mistake_is_seen(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    # A budget that leaves a few tokens for the next prompt: its second chunk begins within a block.
    config = dataclasses.replace(BASE, max_num_seqs=12, max_num_batched_tokens=18, kv_cache_memory=40 * 1024)
    traffic = PrefixTraffic(config, seed=0, rates=TrafficRates(arrival=0.4))
    with pytest.raises((AssertionError, ValueError), match=SEEN):
        traffic.run(4_000, full_check_every=10)
