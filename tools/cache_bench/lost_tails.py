"""What a cached prefix is worth whose sliding tail is gone, by model.

Owns: a replay that is made to lose a tail and nothing else. Must never: reach into the cache (the tail is lost because
later requests need its memory, as in life).
"""

from __future__ import annotations

import dataclasses

from hkv_jax.config import EngineConfig
from hkv_jax.kvcache.receptive import receptive_tokens
from tools.cache_bench.cases import geometry_of
from tools.cache_simulation.measurements import Measurements
from tools.cache_simulation.simulated_cache import simulated_layout
from tools.cache_simulation.simulation import Simulation
from tools.cache_simulation.trace import TraceRequest

CHUNK = 8192
QUESTION_TOKENS = 64
NUM_NOISE = 24
"""Requests in between, all at once, of two windows each: together they want more than the sliding pool has."""


@dataclasses.dataclass(frozen=True, slots=True)
class LostTail:
    """A question to a document of ``document`` tokens, much else, and another question to it, on ``model``."""

    model: str
    document: int

    @property
    def fits(self) -> bool:
        """Whether the model's sequences may be so long."""
        return self._max_model_len <= geometry_of(self.model).max_position

    @property
    def rebuild_tokens(self) -> int:
        """R: tokens run to have a tail back."""
        groups = simulated_layout(self._config(), geometry_of(self.model)).groups
        tokens = receptive_tokens([group.spec for group in groups], [group.format.block_size for group in groups])
        assert tokens is not None, "a model without global layers has nothing to rebuild from"
        return tokens

    def tokens_run(self, *, rebuild: bool) -> int:
        """Prompt tokens computed for the second question.

        Raises:
            AssertionError: the tail was not lost, or more than it was.
        """
        policy = "no-tails" if rebuild else "no-tails-no-rebuild"
        measured = self._measure(policy)
        found = {kind for kind, count in measured.hits.items() if count and kind != "miss"}
        assert found <= {"rebuild"}, f"{self}: the tail is still there ({measured.hits})"
        return self.document + QUESTION_TOKENS - measured.prefix_hit_tokens

    @property
    def _max_model_len(self) -> int:
        return self.document + 1024

    @property
    def _noise_len(self) -> int:
        return 2 * max(group.window or 0 for group in geometry_of(self.model).groups())

    def _measure(self, policy: str) -> Measurements:
        document, (first, second) = ("document", self.document), (("one", QUESTION_TOKENS), ("two", QUESTION_TOKENS))
        noise = [
            TraceRequest(f"noise{number}", 100.0, None, 0.0, ((f"noise{number}", self._noise_len),), 64)
            for number in range(NUM_NOISE)
        ]
        requests = [TraceRequest("first", 0.0, None, 0.0, (document, first), 1), *noise]
        requests.append(TraceRequest("second", 1000.0, None, 0.0, (document, second), 1))
        return Simulation(requests, geometry_of(self.model), self._config(), policy).run()

    def _config(self) -> EngineConfig:
        """Room for everybody's global blocks; sliding blocks for as few sequences of the longest kind as that makes."""
        whole = EngineConfig(
            kv_cache_memory=2**37,
            max_model_len=self._max_model_len,
            max_num_seqs=2 * NUM_NOISE,
            max_num_batched_tokens=CHUNK,
            kv_partition="static",
            expected_average_seq_length=self._max_model_len,
        )
        layout = simulated_layout(whole, geometry_of(self.model))
        tokens = 2 * self._max_model_len + NUM_NOISE * (self._noise_len + 64)
        needed = 0
        for group in layout.groups:
            blocks = group.floor_blocks if group.spec.window else tokens // group.format.block_size
            needed += 2 * blocks * group.format.block_bytes
        return dataclasses.replace(whole, kv_cache_memory=needed)
