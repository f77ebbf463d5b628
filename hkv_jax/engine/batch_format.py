"""The shape of what crosses from host to device in one step: named fields inside one i32 and one f32 buffer.

Owns: buckets, the order and shapes of the fields, NO_TOKEN. The same ``BatchFormat`` cuts the numpy buffers on
the host (as views, to be filled) and the traced arrays on the device. Must never: import jax.

Axis letters: T query tokens, S rows (sequences), G groups, U table updates of a step.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import Any, NamedTuple

NO_TOKEN = -1
"""In ``tokens``: take what the lane drew last. In ``targets`` and ``sample_tokens``: nothing wanted."""


class Bucket(NamedTuple):
    """The static shape of a step program: T tokens, S rows, and whether rows may hold more than one token."""

    num_tokens: int
    num_rows: int
    prefill: bool

    def __str__(self) -> str:
        return f"{'prefill' if self.prefill else 'decode'} {self.num_tokens} tokens x {self.num_rows} rows"


class StepFields(NamedTuple):
    """Views of one step's buffers; shapes in brackets. Values past the live rows or tokens are padding.

    tokens [T]: ids, or NO_TOKEN for a decode row. positions [T]: absolute. targets [T]: the prompt token that
    follows, for prompt logprobs, else NO_TOKEN (shape [0] in decode buckets). query_starts [S+1]: cumulative query
    lengths, padded with the last. start_positions [S]: position of a row's first query. context_starts [S]: sliding
    layers have no K/V below it, whatever the table says; at most start_positions, and a multiple of every block
    size. prompt_lens [S]: tokens below it count as prompt in penalties. lanes [S]: persistent lane of the row;
    padding rows name the lane one past the last. num_rows, num_decode_rows [1]: live rows; how many of them, first,
    have exactly one query. sample_tokens [S]: index into T of the token whose logits are drawn from, or NO_TOKEN.
    slots G x [T]: token slot of layer 0 (page * P + offset), or NO_SLOT. table_updates G x [U, 3]: (lane, column,
    page), padded with the lane one past the last. seeds [S, 2]: high and low word of the seed. samples,
    output_positions [S]: what the draw is a function of. suppress_stops [S]: 1 while fewer than min_tokens were
    drawn. num_logprobs, num_prompt_logprobs [S]: k + 1, or 0 for none asked. The rest [S] as in SamplingParams
    (top_k 0: all).
    """

    tokens: Any
    positions: Any
    targets: Any
    query_starts: Any
    start_positions: Any
    context_starts: Any
    prompt_lens: Any
    lanes: Any
    num_rows: Any
    num_decode_rows: Any
    sample_tokens: Any
    slots: tuple[Any, ...]
    table_updates: tuple[Any, ...]
    seeds: Any
    samples: Any
    output_positions: Any
    suppress_stops: Any
    num_logprobs: Any
    num_prompt_logprobs: Any
    top_k: Any
    temperature: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any


_NUM_HEAD_FIELDS = StepFields._fields.index("slots")


@dataclasses.dataclass(frozen=True)
class BatchFormat:
    """Where each field of a bucket lies in the two packed buffers.

    ``block_sizes`` are those of the groups, in tokens. The blocks of a cached prefix come as whole rows
    (``StepPlan.table_rows``); table updates are the rest.
    """

    bucket: Bucket
    block_sizes: tuple[int, ...]

    def max_table_updates(self, group: int) -> int:
        """U of a group.

        New blocks of all chunks; and for each row a block begun (or the copy after a fork), and the blocks that it has
        filled since it was last recorded, in whose place it may take equal ones of others. Rows of sequences that sit
        the step out may do the latter, too: then a bucket with more rows is needed (``Buckets.choose``).
        """
        size = self.block_sizes[group]
        return self.bucket.num_tokens // size + (1 + max(self.block_sizes) // size) * self.bucket.num_rows

    def int_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the i32 fields in buffer order, those of groups one after the other."""
        tokens, rows, prefill = self.bucket
        groups = range(len(self.block_sizes))
        row_fields = ((rows + 1,), *[(rows,)] * 4, (1,), (1,), (rows,))
        sampling = ((rows, 2), *[(rows,)] * 6)
        return (
            *((tokens,), (tokens,), (tokens if prefill else 0,)),
            *row_fields,
            *((tokens,) for _ in groups),
            *((self.max_table_updates(g), 3) for g in groups),
            *sampling,
        )

    @cached_property
    def _int_cuts(self) -> tuple[tuple[slice, tuple[int, ...] | None], ...]:
        """Where each i32 field lies, and its shape where it has several axes: the same in every step."""
        cuts, offset = [], 0
        for shape in self.int_shapes():
            end = offset + math.prod(shape)
            cuts.append((slice(offset, end), shape if len(shape) > 1 else None))
            offset = end
        return tuple(cuts)

    @property
    def num_ints(self) -> int:
        """Length of the i32 buffer."""
        return self._int_cuts[-1][0].stop

    @property
    def num_floats(self) -> int:
        """Length of the f32 buffer."""
        return 6 * self.bucket.num_rows

    def unpack(self, ints: Any, floats: Any) -> StepFields:
        """Cuts i32[num_ints] and f32[num_floats] into fields; numpy buffers give writable views."""
        fields = [ints[cut] if shape is None else ints[cut].reshape(shape) for cut, shape in self._int_cuts]
        groups = len(self.block_sizes)
        first = _NUM_HEAD_FIELDS
        head, slots = fields[:first], tuple(fields[first : first + groups])
        updates, sampling = tuple(fields[first + groups : first + 2 * groups]), fields[first + 2 * groups :]
        rows = self.bucket.num_rows
        columns = [floats[i * rows : (i + 1) * rows] for i in range(6)]
        return StepFields(*head, slots, updates, *sampling, *columns)  # type: ignore[call-arg]  # counted by the shapes
