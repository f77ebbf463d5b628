"""What the weight files of a model folder hold, read from their headers alone.

A safetensors file is eight bytes of header length, a JSON header that gives each tensor's type, shape and bytes, and
the bytes. Owns: checking all of that, and the index of a sharded checkpoint, before anything is believed. Must never:
read a weight, follow a name out of the folder, or open a format that can run code.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TypeGuard

from hkv_jax.errors import CheckpointError, ConfigError
from hkv_jax.families.fields import parse_json, read_json_object, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_FILES = 10_000

# Bits of an element; types that are missing here are refused where such a tensor is wanted.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    "F4": 4,
}
_MODEL_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: bytes ``[start, start + num_bytes)`` of ``file``, row-major, little-endian."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_weight_files(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by name: of ``model.safetensors``, or of the files its index names.

    Raises:
        CheckpointError: there are no such files, or one is broken or truncated.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        return read_header(single)
    if index.exists():
        return _read_sharded(folder, index)
    pickled = next((path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern)), None)
    hint = f"; {pickled} can run code when it is opened and is never read: save it as safetensors" if pickled else ""
    raise CheckpointError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def common_dtype(tensors: Mapping[str, StoredTensor]) -> str | None:
    """The type most of the weights have, ``float32``, ``bfloat16`` or ``float16``; ``None`` without such weights."""
    totals: dict[str, int] = {}
    for tensor in tensors.values():
        if tensor.dtype in _MODEL_DTYPES:
            name = _MODEL_DTYPES[tensor.dtype]
            totals[name] = totals.get(name, 0) + math.prod(tensor.shape)
    return max(totals, key=totals.__getitem__, default=None)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: the file is no safetensors file, or shorter or longer than its header says.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: truncated: {size} bytes, less than the 8 of a header's length")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: not a safetensors file: its header would have {length} bytes, at most {MAX_HEADER_BYTES}"
                )
            data = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) < length:
        raise CheckpointError(f"{path}: truncated: the header has {length} bytes, the file only {size}")
    try:
        header = parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{path}: broken header: not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: broken header: must be an object, is a {type(header).__name__}")
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_bytes(path, tensors, 8 + length, size)
    return tensors


def _stored(path: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    values = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = values.get("dtype"), values.get("shape"), values.get("data_offsets")
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets)) or len(offsets) != 2:
        raise CheckpointError(f"{path}: broken header: {shown(name)} is described by {shown(entry)}")
    start, end = offsets
    if end < start:
        raise CheckpointError(f"{path}: broken header: {shown(name)} ends at byte {end}, before it starts at {start}")
    bits = math.prod(shape) * _BITS[dtype] if dtype in _BITS else (end - start) * 8
    if bits != (end - start) * 8:
        raise CheckpointError(
            f"{path}: broken header: {shown(name)} of type {dtype} and shape {shown(shape)} needs {-(-bits // 8)} "
            f"bytes, has {end - start}"
        )
    return StoredTensor(name, path, dtype, tuple(shape), data_start + start, end - start)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value
    )


def _check_bytes(path: Path, tensors: Mapping[str, StoredTensor], start: int, size: int) -> None:
    """Every byte after the header belongs to one tensor, as the format demands, and all of them are there."""
    end = start
    for tensor in sorted(tensors.values(), key=lambda one: (one.start, one.num_bytes)):
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: broken header: {shown(tensor.name)} {what}")
        end = tensor.start + tensor.num_bytes
        if end > size:
            raise CheckpointError(
                f"{path}: truncated: {shown(tensor.name)} ends at byte {end}, the file has {size}; copy it again"
            )
    if end != size:
        raise CheckpointError(f"{path}: broken: {size - end} bytes after the last tensor belong to none")


def _read_sharded(folder: Path, index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = read_json_object(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(f"broken index: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: broken index: weight_map must be an object, tensor name to file name")
    files: dict[str, dict[str, StoredTensor]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _stays_inside(file_name):
            raise CheckpointError(
                f"{index}: broken index: {shown(name)} is in {shown(file_name)}; accepted: files of this folder"
            )
        if file_name not in files:
            if len(files) == MAX_FILES:
                raise CheckpointError(f"{index}: broken index: more than {MAX_FILES} files")
            files[file_name] = read_header(folder / file_name)
        if name not in files[file_name]:
            raise CheckpointError(f"{index}: {shown(name)} is missing: {file_name} does not hold it")
    merged: dict[str, StoredTensor] = {}
    for tensors in files.values():
        for name, tensor in tensors.items():
            if name in merged:
                raise CheckpointError(
                    f"{index}: {shown(name)} is in {merged[name].file.name} and in {tensor.file.name}"
                )
            merged[name] = tensor
    return merged


def _stays_inside(file_name: str) -> bool:
    """Whether it is a plain relative path. Links are followed: download caches consist of them."""
    path = PurePosixPath(file_name)
    odd = any(character in file_name for character in "\\:\0")
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not odd
