"""The wire format: stubs that are up to date, and fields that agree with the Python types."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest

from hkv_jax import SamplingParams
from serving.proto import hkv_inference_pb2 as pb
from tools import gen_proto

FOLDER = Path(gen_proto.PROTO).parent


@pytest.mark.parametrize("name", gen_proto.STUBS)
def test_the_stubs_were_generated_from_the_proto_file(name: str) -> None:
    first_line = (FOLDER / name).read_text(encoding="utf-8").splitlines()[0]
    assert gen_proto.sha256_of_proto() in first_line, "run `make proto`"


def test_the_stubs_import_each_other_by_their_package() -> None:
    assert "from serving.proto import hkv_inference_pb2" in (FOLDER / gen_proto.STUBS[2]).read_text(encoding="utf-8")
    assert importlib.import_module("serving.proto.hkv_inference_pb2_grpc").InferenceStub


def test_sampling_has_the_fields_of_the_python_class_and_unset_is_not_zero() -> None:
    wire = pb.SamplingParams.DESCRIPTOR.fields_by_name
    assert set(wire) == {field.name for field in dataclasses.fields(SamplingParams) if field.init}
    containers = {"stop", "stop_token_ids", "logit_bias"}
    assert {name for name, field in wire.items() if not field.has_presence} == containers


def test_numbers_are_kept_free_for_what_is_planned() -> None:
    request = pb.GenerateRequest.DESCRIPTOR
    text = (FOLDER / "hkv_inference.proto").read_text(encoding="utf-8")
    assert not {5, 6, 7, 8} & {field.number for field in request.fields}
    for name in ("adapter", "structured_output", "priority", "cache_salt"):
        assert f'"{name}"' in text
