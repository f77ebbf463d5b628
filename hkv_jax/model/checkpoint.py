"""Weights from safetensors files straight into sharded arrays.

Owns: checking what the files hold against what the model wants, and reading each device's slice. The host holds one
tensor at a time: its pages of the file, and its slices in the dtype they are wanted in. Orbax reads safetensors too,
but only through its experimental interface, which takes every such file of a folder whatever the index says, believes
the header, and repeats no kv heads: with these done here, little is left for it to do.
Must never: hold a whole model on the host, or read what ``families.weight_files`` has not checked.
"""

from __future__ import annotations

import dataclasses
import logging
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from hkv_jax.errors import CheckpointError
from hkv_jax.families.weight_files import StoredTensor, read_weight_files

logger = logging.getLogger(__name__)

_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_MAX_SHOWN = 5
_COMPARED_BYTES = 2**24

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class HeadRepeat:
    """Rows of a tensor belong to ``num_heads`` heads; each head is to come ``times`` times, one after the other.

    What tensor parallelism over more chips than kv heads needs: [heads · D, ...] becomes [heads · times · D, ...].
    """

    num_heads: int
    times: int


class Checkpoint:
    """The weight files of one model folder.

    Raises:
        CheckpointError: there are none, or one is broken or truncated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: Mapping[str, StoredTensor] = read_weight_files(folder)
        self._maps: dict[Path, mmap.mmap] = {}

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Callable[[str], bool]) -> None:
        """Compares the files with what the model wants: tensor name → shape.

        Args:
            expected: every tensor that will be loaded.
            ignored: whether a tensor that is not expected may be there; those are logged in one line.

        Raises:
            CheckpointError: a tensor is missing, has another shape or a type that cannot be read, or is unexpected.
        """
        problems = list(self._problems(expected, ignored))
        if problems:
            more = f"; and {len(problems) - _MAX_SHOWN} more" if len(problems) > _MAX_SHOWN else ""
            raise CheckpointError(f"{self.folder}: {'; '.join(problems[:_MAX_SHOWN])}{more}")
        extra = sorted(self.tensors.keys() - expected.keys())
        if extra:
            logger.info(
                "%s: ignored %d tensors the text model does not use, like %s", self.folder, len(extra), extra[0]
            )

    def check_copy(self, copy: str, original: str) -> None:
        """Checks that tensor ``copy``, if it is there, repeats tensor ``original``: a tied output head must.

        Raises:
            CheckpointError: it has other values, so that the config which ties the two is wrong.
        """
        if copy not in self.tensors or original not in self.tensors:
            return
        one, other = self.tensors[copy], self.tensors[original]
        same = one.dtype == other.dtype and one.shape == other.shape
        if same and not all(np.array_equal(a, b) for a, b in zip(self._pieces(one), self._pieces(other), strict=True)):
            same = False
        if not same:
            raise CheckpointError(
                f"{self.folder}: {copy} differs from {original}, but config.json ties them; "
                "set tie_word_embeddings to false there, or remove the tensor"
            )

    def load(
        self, name: str, sharding: jax.sharding.Sharding, dtype: np.dtype, repeat: HeadRepeat | None = None
    ) -> jax.Array:
        """One tensor, each device getting its slice.

        Args:
            name: a tensor that ``check`` has seen.
            sharding: where the slices go; it divides the shape after repetition.
            dtype: what the values become, slice by slice.
            repeat: how heads along axis 0 are repeated.

        Returns:
            An array of ``dtype`` and of the tensor's shape, axis 0 ``repeat.times`` as long.
        """
        stored = self.tensors[name]
        values = self._view(stored)
        shape = values.shape if repeat is None else (values.shape[0] * repeat.times, *values.shape[1:])

        def read(index: Index | None) -> NDArray[np.generic]:
            assert index is not None
            part = values[index] if repeat is None else _repeated(values, index, repeat)
            # A copy of its own even where no cast is needed: an array must not change when the file does.
            return np.array(part, dtype=dtype, order="C")

        loaded = jax.make_array_from_callback(shape, sharding, read)
        self._forget_pages(stored)
        return loaded

    def _problems(self, expected: Mapping[str, tuple[int, ...]], ignored: Callable[[str], bool]) -> Iterator[str]:
        for name, shape in expected.items():
            stored = self.tensors.get(name)
            if stored is None:
                yield f"{name} is missing, expected with shape {list(shape)}"
            elif stored.shape != tuple(shape):
                yield f"{name} has shape {list(stored.shape)}, expected {list(shape)}"
            elif stored.dtype not in _DTYPES:
                yield f"{name} has type {stored.dtype}, expected one of {', '.join(_DTYPES)}"
        for name in sorted(self.tensors.keys() - expected.keys()):
            if not ignored(name):
                yield f"{name} with shape {list(self.tensors[name].shape)} is not part of this model"

    def _view(self, stored: StoredTensor) -> NDArray[np.generic]:
        dtype = _DTYPES[stored.dtype]
        count = stored.num_bytes // dtype.itemsize
        return np.frombuffer(self._mapped(stored.file), dtype, count, stored.start).reshape(stored.shape)

    def _pieces(self, stored: StoredTensor) -> Iterator[NDArray[np.uint8]]:
        data = np.frombuffer(self._mapped(stored.file), np.uint8)
        end = stored.start + stored.num_bytes
        for start in range(stored.start, end, _COMPARED_BYTES):
            yield data[start : min(end, start + _COMPARED_BYTES)]
        self._forget_pages(stored)

    def _mapped(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            try:
                with path.open("rb") as file:
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error})") from error
        return self._maps[path]

    def _forget_pages(self, stored: StoredTensor) -> None:
        """Lets the pages of a tensor go, so that a large file does not fill the memory it was read through."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = stored.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapped(stored.file).madvise(mmap.MADV_DONTNEED, first, stored.start + stored.num_bytes - first)


def _repeated(values: NDArray[np.generic], index: Index, repeat: HeadRepeat) -> NDArray[np.generic]:
    """The part ``index`` of ``values`` with repeated heads, without ever making all of it."""
    rows = values.shape[0] // repeat.num_heads
    start, stop, _ = index[0].indices(values.shape[0] * repeat.times)
    parts = []
    while start < stop:
        head, first = divmod(start, rows)
        count = min(rows - first, stop - start)
        source = head // repeat.times * rows + first
        parts.append(values[(slice(source, source + count), *index[1:])])
        start += count
    return np.concatenate(parts)
