"""Random traffic that shares prefixes, on a fake engine whose pools are too small for it.

Owns: what arrives, what leaves early, a clock that only steps move, and what must hold after every step. The engine's
``FakeRunner`` sees every token that is read where it should not be; this adds the books: nobody holds blocks that are
not there, everybody gets the tokens they get alone, and in the end the whole arena can be had again. Must never: import
jax, or read the wall clock.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from hkv_jax.engine.buckets import Buckets
from hkv_jax.engine.engine import Engine
from hkv_jax.engine.request import Request
from hkv_jax.engine.scheduler import Scheduler
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.kvcache.block_table import HOLE
from hkv_jax.kvcache.manager import CacheManager
from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.kvcache.prefix_tree import Node
from hkv_jax.kvcache.token_chain import TokenChain
from hkv_jax.outputs import FinishReason, PrefixHit
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.testing.fake_arena import Prints
from hkv_jax.testing.fake_engine import FakeEngineConfig
from hkv_jax.testing.fake_runner import FakeRunner, prefix_prints

T = TypeVar("T")

STEP_SECONDS = 0.025

COMPARED_SHARE = 0.008
"""Of the sequences that finish: running one alone takes as many steps as it has tokens."""

MAX_REMEMBERED = 24
"""Finished conversations that may be taken up again."""


@dataclasses.dataclass(frozen=True)
class TrafficRates:
    """How often things happen before a step, as probabilities; ``max_waiting`` bounds the queue, in sequences."""

    arrival: float = 0.15
    abort: float = 0.01
    stop: float = 0.004
    failure: float = 0.0005
    idle: float = 0.01
    max_waiting: int = 12


class PrefixTraffic:
    """An engine and its clients.

    ``documents`` are what prompts begin with, ``conversations`` what finished requests said and heard. ``hits`` counts
    first admissions by kind, ``num_compared`` the sequences whose tokens were compared with those they get alone.
    """

    def __init__(
        self, config: FakeEngineConfig, seed: int, policy: CachePolicy | None = None, rates: TrafficRates | None = None
    ) -> None:
        """An idle engine for ``config``, and a few documents to talk about."""
        self.config = config
        self.rates = rates or TrafficRates()
        self.rng = np.random.default_rng(seed)
        self.now = 0.0
        self.engine, self.runner = self._engine(config, policy or CachePolicy())
        self.hits: Counter[PrefixHit] = Counter()
        self.num_steps = self.num_compared = self.num_requests = 0
        self.documents = [self._tokens(self._length(0.75)) for _ in range(4)]
        self.conversations: list[list[int]] = []
        self._outputs: dict[str, dict[int, list[int]]] = {}
        self._requests: dict[str, Request] = {}

    def _engine(self, config: FakeEngineConfig, policy: CachePolicy) -> tuple[Engine, FakeRunner]:
        layout = config.layout()
        buckets = Buckets(config.max_num_seqs, config.max_num_batched_tokens, layout.block_sizes)
        limits = dataclasses.replace(config.scheduler_config(), max_bypass_seconds=1.0, max_prefix_wait_seconds=0.5)
        cache = CacheManager(layout, config.max_num_seqs, policy)
        runner = FakeRunner(layout, buckets, config.max_num_seqs, config.vocab_size)
        return Engine(Scheduler(limits, cache, clock=lambda: self.now), cache, runner), runner

    def run(self, num_steps: int, full_check_every: int) -> None:
        """Steps under traffic, with all invariants checked every so many of them and the counts after each."""
        for _ in range(num_steps):
            self.act()
            self.step()
            if self.num_steps % full_check_every == 0:
                self.check()

    def check(self) -> None:
        """Asserts every invariant, and that whatever of known prompts can be found holds the right K/V."""
        self.engine.scheduler.check_invariants()
        size, tree = self.engine.cache.layout.largest_block_size, self.engine.cache.prefixes.tree
        seen: set[bytes] = set()
        prompts = [list(request.prompt_token_ids) for request in self._requests.values()]
        for prompt in (*self.documents, *self.conversations, *prompts):
            tokens, chain = np.array(prompt, np.int32), TokenChain(size)
            chain.append(tokens)
            prints = prefix_prints(tokens.astype(np.int64))
            for digest in chain.digests:
                node = tree.find(digest)
                if node is not None and digest not in seen:
                    seen.add(digest)
                    self._check_node(node, prints[node.end - size : node.end])

    def _check_node(self, node: Node, prints: Prints) -> None:
        for number, (group, blocks) in enumerate(zip(self.engine.cache.layout.groups, node.blocks, strict=True)):
            size = group.format.block_size
            for index, block in enumerate(blocks):
                if block != HOLE:
                    self.runner.check_block(number, group.page(block), prints[index * size : (index + 1) * size])

    def drain(self) -> None:
        """Steps until nobody is left, then has every block back."""
        while self.engine.has_work:
            self.step()
        self.check()
        self._check_whole()

    def act(self) -> None:
        """What happens by chance before a step."""
        if self._chance(self.rates.arrival):
            self.arrive()
        if self._chance(self.rates.abort):
            self.abort()
        if self._chance(self.rates.stop):
            self.stop()
        if self._chance(self.rates.failure):
            self.fail()
        if self._chance(self.rates.idle):
            self.now += float(self.rng.exponential(1.0))

    def step(self) -> list[TokenEvent]:
        """One step of the engine and of the clock."""
        self.now += STEP_SECONDS
        self.num_steps += 1
        events = self.engine.step()
        for event in events:
            self._take(event)
        self._check_counts()
        return events

    def arrive(self) -> None:
        """A request, unless many wait: most often about something that others were about."""
        if self.engine.scheduler.num_waiting >= self.rates.max_waiting:
            return
        prompt = self._prompt()
        room = self.config.max_model_len - len(prompt)
        params = SamplingParams(
            max_tokens=int(self.rng.integers(1, min(room, 32) + 1)),
            seed=int(self.rng.integers(2**62)),
            n=int(self.rng.choice([1, 1, 1, 1, 2, 3])),
            presence_penalty=float(self.rng.choice([0.0, 0.5])),
            stop_token_ids=(int(self.rng.integers(self.config.vocab_size)),),
            prompt_logprobs=1 if self._chance(0.04) else None,
        )
        self.submit(prompt, params)

    def submit(self, prompt: list[int], params: SamplingParams) -> None:
        """A request of the caller's own."""
        request = Request.create(f"r{self.num_requests}", prompt, params)
        self.num_requests += 1
        self._requests[request.request_id] = request
        self._outputs[request.request_id] = {sample: [] for sample in range(params.n)}
        self.engine.add(request)

    def abort(self) -> None:
        """Somebody hangs up."""
        if self._requests:
            name = self._pick(list(self._requests))
            self._forget(name)
            self.engine.abort(name)

    def stop(self) -> None:
        """A stop string is found in somebody's text."""
        if self._requests:
            name = self._pick(list(self._requests))
            samples = list(self._outputs[name])
            self._forget(name)
            for sample in samples:
                self.engine.finish(name, sample)

    def fail(self) -> None:
        """The device loses everything."""
        self.engine.scheduler.reset()
        self.engine._in_flight = None  # what a failed step leaves behind
        self.runner.reset()

    def _prompt(self) -> list[int]:
        kind = self.rng.random()
        if kind < 0.15:
            prompt = self._tokens(self._length(0.3))
        elif kind < 0.35 and self.conversations:
            prompt = [*self._pick(self.conversations), *self._tokens(int(self.rng.integers(1, 9)))]
        elif kind < 0.45 and self.conversations:
            prompt = list(self._pick(self.conversations))
        else:
            document = self._pick(self.documents)
            cut = len(document) if self._chance(0.6) else int(self.rng.integers(1, len(document) + 1))
            question = [] if self._chance(0.15) else self._tokens(int(self.rng.integers(1, 9)))
            prompt = [*document[:cut], *question]
            if self._chance(0.01):
                self.documents[int(self.rng.integers(len(self.documents)))] = self._tokens(self._length(0.75))
        return prompt[: self.config.max_model_len - 2]

    def _take(self, event: TokenEvent) -> None:
        sequence = event.sequence
        name = sequence.request.request_id
        if name not in self._requests:
            return
        outputs = self._outputs[name]
        outputs[sequence.sample].append(event.token_id)
        if len(outputs[sequence.sample]) == 1 and sequence.first_prefix is not None:
            self.hits[sequence.first_prefix.hit] += 1
        if event.finish_reason is not None:
            request = self._requests[name]
            if self._chance(COMPARED_SHARE):
                self._compare(request, sequence.sample, outputs[sequence.sample], event.finish_reason)
            self._remember([*request.prompt_token_ids, *outputs[sequence.sample]])
            del outputs[sequence.sample]
            if not outputs:
                self._forget(name)

    def _compare(self, request: Request, sample: int, tokens: list[int], reason: FinishReason) -> None:
        """What the sample got must be what it gets on a device of its own that remembers nothing."""
        roomy = dataclasses.replace(self.config, kv_cache_memory=4 * self.config.kv_cache_memory)
        alone, _ = self._engine(roomy, CachePolicy(enabled=False))
        alone.add(request)
        expected = []
        while alone.has_work:
            expected += [event for event in alone.step() if event.sequence.sample == sample]
        assert [event.token_id for event in expected] == tokens, f"{request.request_id} got other tokens than alone"
        assert expected[-1].finish_reason is reason, f"{request.request_id} ended otherwise than alone"
        self.num_compared += 1

    def _remember(self, tokens: list[int]) -> None:
        self.conversations.append(tokens)
        if len(self.conversations) > MAX_REMEMBERED:
            del self.conversations[int(self.rng.integers(MAX_REMEMBERED))]

    def _forget(self, name: str) -> None:
        del self._requests[name], self._outputs[name]

    def _check_counts(self) -> None:
        """What can be seen at a glance: no pool holds more than it has, and who does not run holds nothing."""
        pools = self.engine.cache.stats()
        for pool in pools:
            assert 0 <= pool.used_blocks + pool.cached_blocks <= pool.num_blocks, f"P1: {pool}"
        assert self.engine.scheduler.num_running or not any(pool.used_blocks for pool in pools), "M2: held by nobody"

    def _check_whole(self) -> None:
        """Nobody runs: each slab has its owner still, and without the cache every block is free."""
        layout = self.engine.cache.layout
        self.engine.cache.reset()
        self.engine.cache.check_invariants()
        slab_of = [group.blocks_per_slab for group in layout.groups]
        slabs: Counter[int] = Counter()
        for group, pool, size in zip(layout.groups, self.engine.cache.stats(), slab_of, strict=True):
            assert pool.used_blocks == pool.cached_blocks == 0, f"M2: {pool}"
            slabs[group.arena] += pool.num_blocks // size
        assert [slabs[arena] for arena in range(len(layout.arenas))] == [arena.num_slabs for arena in layout.arenas]

    def _chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def _length(self, share: float) -> int:
        """Around ``share`` of the longest sequence."""
        longest = int(share * self.config.max_model_len)
        return int(self.rng.integers(max(1, longest // 2), longest + 1))

    def _tokens(self, count: int) -> list[int]:
        tokens: list[int] = self.rng.integers(0, self.config.vocab_size, count).tolist()
        return tokens

    def _pick(self, choices: Sequence[T]) -> T:
        return choices[int(self.rng.integers(len(choices)))]
