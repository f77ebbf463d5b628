"""Safetensors files into sharded arrays: values, types, repeated heads, and every way a folder can be wrong."""

from __future__ import annotations

import json
import logging
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from hkv_jax.errors import CheckpointError
from hkv_jax.model.checkpoint import Checkpoint, HeadRepeat

F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)


def mesh(size: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[:size]), ("model",))


def over(size: int, *axes: str | None) -> NamedSharding:
    return NamedSharding(mesh(size), PartitionSpec(*axes))


def numbers(*shape: int, dtype: np.dtype = F32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def save(folder: Path, tensors: Mapping[str, np.ndarray]) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    return Checkpoint(folder)


def nothing(_: str) -> bool:
    return False


@pytest.mark.parametrize("stored", [F32, BF16, F16])
@pytest.mark.parametrize("wanted", [F32, BF16])
@pytest.mark.parametrize("axes", [(), ("model", None), (None, "model")])
def test_each_device_gets_its_slice_in_the_wanted_type(
    tmp_path: Path, stored: np.dtype, wanted: np.dtype, axes: tuple[Any, ...]
) -> None:
    values = numbers(8, 12, dtype=stored)
    # A tensor of odd length before it: its bytes are then not aligned.
    checkpoint = save(tmp_path, {"a": numbers(3, dtype=BF16), "w": values})
    loaded = checkpoint.load("w", over(4, *axes), wanted)
    assert loaded.dtype == wanted
    assert loaded.sharding == over(4, *axes)
    np.testing.assert_array_equal(np.asarray(loaded), values.astype(wanted))
    for shard in loaded.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), values[shard.index].astype(wanted))


def test_loaded_values_outlive_the_file(tmp_path: Path) -> None:
    """The bytes of the tensor are aligned as a CPU device wants them, so that it would take them without a copy."""
    values = numbers(64, 64)
    header = json.dumps({"w": {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, values.nbytes]}}).encode()
    header = header.ljust(4096 - 8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    loaded = Checkpoint(tmp_path).load("w", over(1), F32)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(values.nbytes))
    np.testing.assert_array_equal(np.asarray(loaded), values)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, {"scalar": np.full((), 3.5, np.float32), "empty": np.zeros((0, 4), np.float32)})
    checkpoint.check({"scalar": (), "empty": (0, 4)}, nothing)
    assert float(checkpoint.load("scalar", over(2), F32)) == 3.5
    assert checkpoint.load("empty", over(1), F32).shape == (0, 4)


@pytest.mark.parametrize(("heads", "times", "chips"), [(1, 4, 4), (2, 2, 4), (2, 1, 2), (2, 3, 3), (3, 4, 4)])
@pytest.mark.parametrize("trailing", [(), (5,)])
def test_heads_are_repeated_one_after_the_other(
    tmp_path: Path, heads: int, times: int, chips: int, trailing: tuple[int, ...]
) -> None:
    head_dim = 6
    values = numbers(heads * head_dim, *trailing)
    expected = np.repeat(values.reshape(heads, head_dim, *trailing), times, axis=0).reshape(-1, *trailing)
    checkpoint = save(tmp_path, {"k": values})
    loaded = checkpoint.load("k", over(chips, "model"), F32, HeadRepeat(heads, times))
    np.testing.assert_array_equal(np.asarray(loaded), expected)


@pytest.mark.parametrize("axes", [("model", None), (None, "model")])
def test_a_shard_may_begin_anywhere_in_a_repeated_head(tmp_path: Path, axes: tuple[str | None, ...]) -> None:
    values = numbers(2 * 6, 3)
    expected = np.repeat(values.reshape(2, 6, 3), 2, axis=0).reshape(-1, 3)
    loaded = save(tmp_path, {"k": values}).load("k", over(3, *axes), F32, HeadRepeat(2, 2))
    np.testing.assert_array_equal(np.asarray(loaded), expected)


def sharded_folder(folder: Path, files: Mapping[str, Mapping[str, np.ndarray]], weight_map: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        save_file(dict(tensors), folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_an_index_names_the_file_of_each_tensor(tmp_path: Path) -> None:
    one, two = numbers(4, 2), numbers(6)
    files = {"model-1.safetensors": {"a": one}, "model-2.safetensors": {"b": two}}
    folder = sharded_folder(tmp_path, files, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    # Beside the index and not in it: not part of the checkpoint.
    save_file({"a": two}, folder / "consolidated.safetensors")
    checkpoint = Checkpoint(folder)
    checkpoint.check({"a": (4, 2), "b": (6,)}, nothing)
    np.testing.assert_array_equal(np.asarray(checkpoint.load("a", over(2, "model"), F32)), one)
    np.testing.assert_array_equal(np.asarray(checkpoint.load("b", over(1), F32)), two)


def test_a_single_file_is_preferred_to_an_index(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path, {"x.safetensors": {"a": numbers(2)}}, {"a": "x.safetensors"})
    assert save(folder, {"b": numbers(3)}).tensors.keys() == {"b"}


@pytest.mark.parametrize(
    ("expected", "says"),
    [
        ({"a": (4, 2), "b": (3,), "c": (1,)}, r"c is missing, expected with shape \[1\]"),
        ({"a": (2, 4), "b": (3,)}, r"a has shape \[4, 2\], expected \[2, 4\]"),
        ({"a": (4, 2)}, r"b with shape \[3\] is not part of this model"),
    ],
)
def test_what_does_not_fit_the_model_is_named(tmp_path: Path, expected: dict[str, tuple[int, ...]], says: str) -> None:
    checkpoint = save(tmp_path, {"a": numbers(4, 2), "b": numbers(3)})
    with pytest.raises(CheckpointError, match=says):
        checkpoint.check(expected, nothing)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, {"a": numbers(2)})
    with pytest.raises(CheckpointError, match="and 4 more"):
        checkpoint.check({"a": (2,)} | {f"m{index}": (1,) for index in range(9)}, nothing)


def test_types_that_are_no_weights_are_refused_where_they_are_wanted(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, {"a": np.zeros(3, np.int8), "b": np.zeros(3, np.float64)})
    with pytest.raises(CheckpointError, match="a has type I8, expected one of F32, BF16, F16; b has type F64"):
        checkpoint.check({"a": (3,), "b": (3,)}, nothing)
    checkpoint.check({}, lambda _: True)


def test_ignored_tensors_are_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = save(tmp_path, {"a": numbers(2), "vision.x": numbers(2), "vision.y": numbers(2)})
    with caplog.at_level(logging.INFO, "hkv_jax"):
        checkpoint.check({"a": (2,)}, lambda name: name.startswith("vision."))
    assert [record.getMessage() for record in caplog.records if "vision.x" in record.getMessage()]
    assert len(caplog.records) == 1
    assert "2 tensors" in caplog.text


def test_a_tied_head_must_repeat_the_embedding(tmp_path: Path) -> None:
    values = numbers(8, 4)
    save(tmp_path / "same", {"e": values, "h": values.copy()}).check_copy("h", "e")
    save(tmp_path / "absent", {"e": values}).check_copy("h", "e")
    changed = values.copy()
    changed[-1, -1] += 1
    for name, head in (("value", changed), ("shape", values[:4].copy()), ("type", values.astype(BF16))):
        with pytest.raises(CheckpointError, match=r"h differs from e.*tie_word_embeddings"):
            save(tmp_path / name, {"e": values, "h": head}).check_copy("h", "e")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json$"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin can run code"):
        Checkpoint(tmp_path)


def test_the_host_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    tensors = {f"t{index}": numbers(256, 1024) for index in range(8)}
    one = tensors["t0"].nbytes
    checkpoint = save(tmp_path, tensors)
    checkpoint.load("t0", over(2, "model"), F32)
    tracemalloc.start()
    try:
        for name in tensors:
            # Dropped at once: what stays on a CPU device is memory of this process too.
            checkpoint.load(name, over(2, "model"), F32).block_until_ready()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert one <= peak < 3 * one
