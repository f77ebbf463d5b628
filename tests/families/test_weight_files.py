"""Headers and indices of weight files: what is believed, and what is refused."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from hkv_jax.errors import CheckpointError
from hkv_jax.families.weight_files import MAX_HEADER_BYTES, StoredTensor, common_dtype, read_header, read_weight_files

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GOOD = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float16)})


def header_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_shape_type_and_place_of_each_tensor(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(GOOD)
    tensors = read_weight_files(tmp_path)
    a, b = tensors["a"], tensors["b"]
    assert (a.dtype, a.shape, a.num_bytes) == ("F32", (2, 3), 24)
    assert (b.dtype, b.shape, b.num_bytes) == ("F16", (5,), 10)
    assert GOOD[a.start : a.start + 24] == np.arange(6, dtype=np.float32).tobytes()
    assert GOOD[b.start : b.start + 10] == np.ones(5, np.float16).tobytes()


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, len(GOOD) // 2, len(GOOD) - 11, len(GOOD) - 1])
def test_a_truncated_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / FILE
    path.write_bytes(GOOD[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        read_header(path)


@pytest.mark.parametrize("length", range(0, len(GOOD), 3))
def test_no_prefix_of_a_file_passes(tmp_path: Path, length: int) -> None:
    path = tmp_path / FILE
    path.write_bytes(GOOD[:length])
    with pytest.raises(CheckpointError):
        read_header(path)


def test_the_truncated_tensor_is_named_with_its_end_and_the_size(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(GOOD[:-1])
    with pytest.raises(CheckpointError, match=rf"'b' ends at byte {len(GOOD)}, the file has {len(GOOD) - 1}"):
        read_header(path)


def test_a_header_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}")
    with pytest.raises(CheckpointError, match=f"would have {MAX_HEADER_BYTES + 1} bytes"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"{", b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "nested too deep"),
        (b'{"a": NaN}', b"", "NaN"),
        (b'{"a": {}, "a": {}}', b"", "'a' is there twice"),
        ([], b"", "must be an object, is a list"),
        ({"a": 3}, b"", "'a' is described by 3"),
        ({"a": entry(dtype=7)}, bytes(8), "'a' is described by"),
        ({"a": entry(shape=[-2])}, bytes(8), "'a' is described by"),
        ({"a": entry(shape=[True, 2])}, bytes(8), "'a' is described by"),
        ({"a": entry(shape=None)}, bytes(8), "'a' is described by"),
        ({"a": entry(shape=[2.0])}, bytes(8), "'a' is described by"),
        ({"a": entry(offsets=[0])}, bytes(8), "'a' is described by"),
        ({"a": entry(offsets=[8, 0])}, bytes(8), "'a' ends at byte 0, before it starts at 8"),
        ({"a": entry(shape=[3])}, bytes(8), "needs 12 bytes, has 8"),
        ({"a": entry(shape=[2**40, 2**40])}, bytes(8), "bytes, has 8"),
        ({"a": entry(offsets=[4, 12])}, bytes(12), "'a' leaves a gap before it"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "'b' overlaps"),
        ({"a": entry(), "b": entry()}, bytes(8), "overlaps"),
        ({"a": entry()}, bytes(9), "1 bytes after the last tensor"),
    ],
)
def test_a_broken_header(tmp_path: Path, header: object, data: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_header(header_file(tmp_path / FILE, header, data))


def test_unknown_types_are_left_to_whoever_wants_the_tensor(tmp_path: Path) -> None:
    path = header_file(tmp_path / FILE, {"__metadata__": {"x": "y"}, "a": entry(dtype="F6_E2M3")}, bytes(8))
    assert read_header(path)["a"].dtype == "F6_E2M3"


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weight_files(tmp_path)


@given(position=st.integers(0, len(GOOD) - 25), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_harmless(position: int, value: int) -> None:
    """Whatever one byte of the header becomes, the tensors found lie inside the file."""
    damaged = bytearray(GOOD)
    damaged[position] = value
    tensors = tensors_of(bytes(damaged))
    assert all(0 <= one.start <= one.start + one.num_bytes <= len(GOOD) for one in tensors.values())


@given(data=st.binary(max_size=80))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    assert tensors_of(data) == {}


def tensors_of(data: bytes) -> dict[str, StoredTensor]:
    """What a file of these bytes holds, nothing where it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        path.write_bytes(data)
        try:
            return read_header(path)
        except CheckpointError:
            return {}


def index_folder(folder: Path, content: object) -> Path:
    (folder / "one.safetensors").write_bytes(GOOD)
    (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "file_name",
    ["../one.safetensors", "/one.safetensors", "x/../../one.safetensors", "", ".", "..\\one", "C:one", "a\0b", 3, None],
)
def test_an_index_cannot_leave_the_folder(tmp_path: Path, file_name: object) -> None:
    with pytest.raises(CheckpointError, match=r"broken index: 'a' is in .*accepted: files of this folder"):
        read_weight_files(index_folder(tmp_path, {"weight_map": {"a": file_name}}))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "broken index: .*not valid JSON"),
        ("[]", "broken index: .*must hold one JSON object"),
        ({}, "weight_map must be an object"),
        ({"weight_map": []}, "weight_map must be an object"),
        ({"weight_map": {}}, "weight_map must be an object"),
        ({"weight_map": {"a": "two.safetensors"}}, r"two\.safetensors: cannot be read"),
        ({"weight_map": {"c": "one.safetensors"}}, r"'c' is missing: one\.safetensors does not hold it"),
    ],
)
def test_a_broken_index(tmp_path: Path, content: object, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_weight_files(index_folder(tmp_path, content))


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    index_folder(tmp_path, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    (tmp_path / "two.safetensors").write_bytes(GOOD)
    with pytest.raises(CheckpointError, match=r"is in one\.safetensors and in two\.safetensors"):
        read_weight_files(tmp_path)


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    """Download caches keep files elsewhere and link to them."""
    (tmp_path / "blob").write_bytes(GOOD)
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / FILE).symlink_to(tmp_path / "blob")
    assert read_weight_files(folder).keys() == {"a", "b"}


def test_the_common_type_is_that_of_most_weights(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(GOOD)
    assert common_dtype(read_weight_files(tmp_path)) == "float32"
    (tmp_path / FILE).write_bytes(save({"ids": np.zeros(9, np.int64)}))
    assert common_dtype(read_weight_files(tmp_path)) is None
