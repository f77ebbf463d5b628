"""The server as a command: signals, exit codes, what it prints; in process, on an engine whose device is fake."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

import pytest

from hkv_jax.errors import EngineStoppedError
from hkv_jax.sampling_params import SamplingParams
from serving.cli import main
from serving.client import InferenceClient


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_serve_until_a_signal(
    model: Path, capsys: pytest.CaptureFixture[str], free_port: int, number: signal.Signals, code: int
) -> None:
    seen: list[object] = []

    def visit() -> None:
        try:
            with InferenceClient(f"127.0.0.1:{free_port}") as client:
                client.wait_ready(timeout=20)
                seen.append(client.server_info().model)
        finally:
            os.kill(os.getpid(), number)

    visitor = threading.Thread(target=visit)
    visitor.start()
    assert main(["serve", "--model", str(model), "--port", str(free_port)]) == code
    visitor.join()
    assert seen == [model.name]
    err = capsys.readouterr().err
    assert f"serving on 127.0.0.1:{free_port}" in err
    assert re.search(r"^  pool +blocks +block size +tokens +bytes +MiB$", err, re.MULTILINE), "the split"
    assert re.search(r"^  sliding +\d+ +4 +\d+ +\d+ +\d+\.\d$", err, re.MULTILINE)
    assert re.search(r"^  fits \d+ sequences of \d+ tokens; one sequence has at most \d+$", err, re.MULTILINE)
    assert err.splitlines()[-1] == "stopped"


def test_serve_logs_what_it_does(
    model: Path, caplog: pytest.LogCaptureFixture, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.commands.serve._ACTIVITY_SECONDS", 0.001)
    monkeypatch.setattr("serving.commands.serve._WATCH_SECONDS", 0.01)

    def visit() -> None:
        try:
            with InferenceClient(f"127.0.0.1:{free_port}") as client:
                client.wait_ready(timeout=20)
                stream = client.generate_stream("the cat", SamplingParams(ignore_eos=True, n=64))
                while not any("running" in record.getMessage() for record in caplog.records):
                    next(stream)
                stream.close()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    visitor = threading.Thread(target=visit)
    visitor.start()
    with caplog.at_level("INFO", logger="serving"):
        assert main(["serve", "--model", str(model), "--port", str(free_port)]) == 0
    visitor.join()
    lines = [record.getMessage() for record in caplog.records if record.name == "serving.commands.serve"]
    assert re.search(r"^[1-8] running, \d+ waiting; .* output tokens/s; blocks in use: global \d+%", lines[0])


def test_serve_says_that_its_port_is_taken(model: Path, capsys: pytest.CaptureFixture[str], taken_port: int) -> None:
    assert main(["serve", "--model", str(model), "--port", str(taken_port)]) == 2
    assert f"port {taken_port} cannot be listened on" in capsys.readouterr().err


def test_a_server_whose_engine_has_died_ends(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hkv_jax.engine.loop.EngineLoop.running", False)
    assert main(["serve", "--model", str(model), "--port", "0"]) == 1
    assert "the engine has stopped" in capsys.readouterr().err


def test_serve_without_grpc_says_what_to_install(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "--model", str(model), "--port", "0"]) == 2
    assert "pip install 'hkv-jax[serving]'" in capsys.readouterr().err


def test_a_second_signal_cuts_off_who_does_not_end(model: Path, free_port: int) -> None:
    outcome: list[type[BaseException]] = []

    def visit() -> None:
        try:
            with InferenceClient(f"127.0.0.1:{free_port}") as client:
                client.wait_ready(timeout=20)
                stream = client.generate_stream("the cat", SamplingParams(ignore_eos=True, n=64))
                next(stream)
                os.kill(os.getpid(), signal.SIGTERM)
                next(stream)
                os.kill(os.getpid(), signal.SIGINT)
                for _ in stream:
                    pass
        except EngineStoppedError as error:
            outcome.append(type(error))

    visitor = threading.Thread(target=visit)
    visitor.start()
    code = main(["serve", "--model", str(model), "--port", str(free_port), "--drain-seconds", "86400"])
    visitor.join()
    assert code == 0
    assert outcome == [EngineStoppedError]
