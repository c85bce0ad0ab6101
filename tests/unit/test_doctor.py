"""`kindling doctor`: every state of every check, and what the exit code hangs on."""

import importlib.metadata
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from train import doctor
from train.doctor import Finding

WANTED, TESTED = Requirement("torch>=2.11,<3"), Requirement("torch==2.13.0")


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("2.13.0", "OK"),
        ("2.13.0+cpu", "OK"),
        ("2.13.0+cu130", "OK"),
        ("2.14.1", "look"),
        ("2.10.0", "missing"),
        ("3.0.0", "missing"),
        (None, "missing"),
    ],
)
def test_package(version: str | None, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    finding = doctor.check_package(WANTED, tested=TESTED, absent="missing")
    assert finding.state == state
    assert (finding.todo == "") == (state == "OK")


def test_every_dependency_is_pinned_and_here() -> None:
    found = {finding.name: finding.state for finding in doctor.check_packages()}
    assert {"torch", "diffusers", "transformers", "wandb"} <= found.keys()
    assert "missing" not in found.values()


def test_real_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = doctor.main(["--json", "--output", str(tmp_path / "a" / "b"), "--cache", str(tmp_path)])
    report = json.loads(capsys.readouterr().out)
    states = {finding["name"]: finding["state"] for finding in report["findings"]}
    assert states["python"] == states["torch build"] == "OK"
    assert states["8-bit optimizer"] == "OK"
    assert report["ready"] == (code == 0) == ("missing" not in states.values())


@pytest.mark.parametrize(("state", "code"), [("OK", 0), ("look", 0), ("missing", 2)])
def test_exit_code(
    state: doctor.State, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    findings = [Finding("a", "OK", "fine"), Finding("b", state, "so so", "do this")]
    monkeypatch.setattr(doctor, "examine", lambda *args, **kwargs: iter(findings))
    assert doctor.main([]) == code
    text = capsys.readouterr().out
    assert "-> do this" in text
    assert ("can't work" in text) == (code == 2)


def test_a_broken_library_is_a_finding() -> None:
    def broken():
        yield Finding("torch build", "OK", "2.13.0")
        raise ImportError("libcudart.so.13: cannot open shared object file\nmore")

    found = list(doctor.guarded("torch", broken))
    assert [finding.state for finding in found] == ["OK", "missing"]
    assert found[1].found == "ImportError: libcudart.so.13: cannot open shared object file"


@pytest.mark.parametrize(
    ("seen", "cuda", "words"),
    [
        ([], None, "need an NVIDIA GPU"),
        (["NVIDIA L4, 550.54"], None, "CPU build"),
        (["NVIDIA L4, 550.54"], "13.0", "update the driver to one for CUDA 13.0"),
    ],
)
def test_why_there_is_no_gpu(seen: list[str], cuda: str | None, words: str) -> None:
    finding = doctor.no_gpu(seen, cuda=cuda)
    assert finding.state == "look"
    assert words in finding.todo


@pytest.mark.parametrize(
    ("gigabytes", "major", "state", "words"),
    [
        (80, 9, "OK", ""),
        (24, 8, "look", "weights of dev (64 GB)"),
        (12, 8, "look", "klein-9b (18 GB), dev (64 GB)"),
        (16, 7, "look", "no bf16"),
    ],
)
def test_gpu(
    gigabytes: int, major: int, state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = SimpleNamespace(name="NVIDIA X", total_memory=gigabytes * 1e9, major=major, minor=0)
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    finding = doctor.check_gpu(0, driver="580.1")
    assert finding.state == state
    assert words in finding.todo
    expected = f"NVIDIA X, {gigabytes} GB, compute capability {major}.0, driver 580.1"
    assert finding.found == expected


def test_a_gpu_that_does_not_compute_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*shape: int, device: str) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")

    facts = SimpleNamespace(name="NVIDIA X", total_memory=80e9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch, "ones", refuse)
    finding = doctor.check_gpu(0, driver="580.1")
    assert finding.state == "missing"
    assert finding.found.endswith("no kernel image is available")


@pytest.mark.parametrize("failure", [FileNotFoundError(), subprocess.TimeoutExpired("x", 20)])
def test_no_driver(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args, **kwargs):
        raise failure

    monkeypatch.setattr(subprocess, "run", run)
    assert doctor.nvidia_smi() == []


@pytest.mark.parametrize(("available", "state"), [(1e9, "missing"), (8e9, "OK")])
def test_memory(available: float, state: str) -> None:
    assert doctor.check_memory(available).state == state


def test_disk(tmp_path: Path) -> None:
    def check(folder: Path, *, need: float) -> Finding:
        return doctor.check_disk("disk", folder, need=need, lacking="missing", todo="elsewhere")

    file = tmp_path / "file"
    file.touch()
    assert check(tmp_path / "new" / "folder", need=0).state == "OK"
    assert check(tmp_path, need=1e18).state == "missing"
    assert check(file / "below", need=0) == Finding(
        "disk", "missing", f"can't write to {file}", "elsewhere"
    )


def test_hub_is_not_asked_without_online(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise AssertionError("went to the network")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    found = {finding.name: finding for finding in doctor.check_hub(online=False)}
    assert found["hub login"].state == "look"
    assert found["hub mode"].found == "offline"
    assert "licence" not in found


def test_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    refused = GatedRepoError(
        "403", response=httpx.Response(403, request=httpx.Request("HEAD", "x:"))
    )
    broken = [httpx.ConnectError("no route"), TimeoutError("timed out"), KeyError("a bug")]
    answers = iter([None, refused, *broken])

    def ask(url: str, *, timeout: float) -> None:
        assert doctor.GATED in url
        assert timeout <= 10
        if error := next(answers):
            raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    granted, gated, unrouted, unreachable = (doctor.check_licence() for _ in range(4))
    assert granted.state == "OK"
    assert (gated.state, "accept the licence" in gated.todo) == ("look", True)
    assert (unrouted.state, unrouted.found) == ("look", "ConnectError: no route")
    assert (unreachable.state, unreachable.found) == ("look", "TimeoutError: timed out")
    with pytest.raises(KeyError, match="a bug"):
        doctor.check_licence()
