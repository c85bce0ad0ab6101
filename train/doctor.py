"""`kindling doctor`: what works on this machine for training, and what to do about what doesn't.

Looks, and takes one tiny optimizer step; installs and downloads nothing, and goes to the network
only with `--online`. A check that itself fails is reported like any other finding.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
GB = 1e9
TOY_MEMORY = 1.5 * GB
TOY_DISK = 1 * GB
FROZEN = {"klein-4b": 7.8 * GB, "klein-9b": 18.2 * GB, "dev": 64.4 * GB}
"""Transformer weights in bf16, 2 bytes a parameter: what a GPU must hold besides the rest."""
DEV_DOWNLOAD = 113 * GB
"""FLUX.2-dev in bf16: transformer 64.4, text encoder 48, VAE 0.3."""
GATED = "black-forest-labs/FLUX.2-dev"
ONLINE_TIMEOUT = 10.0
REINSTALL = "run `python3 scripts/setup_env.py`"

State = Literal["OK", "look", "missing"]


@dataclass(frozen=True)
class Finding:
    """A line of the report. missing: the toy base can't train without. look: other jobs can't."""

    name: str
    state: State
    found: str
    todo: str = ""


Check = Callable[[], Iterable[Finding]]


def main(argv: list[str] | None = None) -> int:
    """Print the report; 0 if training on the toy base can work, else 2."""
    parser = argparse.ArgumentParser(prog="kindling doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.add_argument("--online", action="store_true", help=f"ask the hub about {GATED}")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="folder of encoded data")
    options = parser.parse_args(argv)
    findings = list(examine(options.output, options.cache, online=options.online))
    ready = all(f.state != "missing" for f in findings)
    if options.json:
        print(json.dumps({"ready": ready, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        print_report(findings, ready=ready)
    return 0 if ready else 2


def print_report(findings: list[Finding], *, ready: bool) -> None:
    """A line for each finding, and below it what to do about it."""
    for finding in findings:
        print(f"{finding.state:<8}{finding.name:<16}{finding.found}")
        if finding.todo:
            print(f"{'':<24}-> {finding.todo}")
    verdict = "can work here" if ready else "can't work here until what is missing is there"
    print(f"\nTraining on the toy base {verdict}.")


def examine(output: Path, cache: Path, *, online: bool) -> Iterator[Finding]:
    """All findings, in the order in which a reader wants them."""
    yield Finding("python", "OK", f"{platform.python_version()}, {platform.platform(terse=True)}")
    yield from guarded("packages", check_packages)
    yield from guarded("torch", check_torch)
    yield from guarded("8-bit optimizer", check_bitsandbytes, broken="look")
    yield from guarded("RAM", lambda: [check_memory(available_memory())])
    todo = f"choose another folder, with {TOY_DISK / GB:.0f} GB free"
    for name, folder in (("disk, runs", output), ("disk, cache", cache)):
        yield check_disk(name, folder, need=TOY_DISK, lacking="missing", todo=todo)
    yield from guarded("hub", lambda: check_hub(online=online), broken="look")


def guarded(name: str, check: Check, *, broken: State = "missing") -> Iterator[Finding]:
    """The check's findings; if a library breaks it, that is the finding."""
    try:
        yield from check()
    except Exception as error:  # a half-installed library may break in any way
        yield Finding(name, broken, first_line(error), REINSTALL)


def first_line(error: Exception) -> str:
    """The error's kind and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def check_packages() -> Iterator[Finding]:
    """Every direct dependency: inside the allowed range, and the version that is tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    tested = {pin.name: pin for pin in pins}
    for wanted in map(Requirement, project["dependencies"]):
        yield check_package(wanted, tested=tested[wanted.name], absent="missing")
    for wanted in map(Requirement, project["optional-dependencies"]["wandb"]):
        yield check_package(wanted, tested=tested[wanted.name], absent="look")


def check_package(wanted: Requirement, *, tested: Requirement, absent: State) -> Finding:
    """One installed package against its allowed range and its tested version."""
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(wanted.name, absent, "not installed", REINSTALL)
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding(wanted.name, absent, f"{version}, needs {wanted.specifier}", REINSTALL)
    if tested.specifier.contains(version, prereleases=True):
        return Finding(wanted.name, "OK", version)
    return Finding(wanted.name, "look", version, f"not the tested version, {tested.specifier}")


def check_torch() -> Iterator[Finding]:
    """torch's build, and every GPU that it can or can't use."""
    import torch

    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("torch build", "OK", f"{torch.__version__}, {build}")
    seen = nvidia_smi()
    if not torch.cuda.is_available():
        yield no_gpu(seen, cuda=torch.version.cuda)
        return
    driver = seen[0].split(", ")[-1] if seen else "unknown"
    for index in range(torch.cuda.device_count()):
        yield check_gpu(index, driver=driver)


def nvidia_smi() -> list[str]:
    """`name, driver version` of each GPU that the driver sees; empty without a driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def no_gpu(seen: list[str], *, cuda: str | None) -> Finding:
    """Why torch has no GPU: there is none, torch is a CPU build, or the driver is too old."""
    if not seen:
        todo = "the toy base trains on the CPU; dev and klein need an NVIDIA GPU and its driver"
        return Finding("GPU", "look", "none found", todo)
    todo = (
        "this torch is a CPU build, as PyPI has it for Windows: see https://pytorch.org/get-started"
    )
    if cuda is not None:
        todo = f"update the driver to one for CUDA {cuda}, or install a torch for an older CUDA"
    return Finding("GPU", "look", f"{seen[0]} is there, but torch can't use it", todo)


def check_gpu(index: int, *, driver: str) -> Finding:
    """One GPU: does it compute, has it bf16, whose frozen weights does it hold."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    name, size = f"GPU {index}", properties.total_memory
    capability = f"compute capability {properties.major}.{properties.minor}"
    found = f"{properties.name}, {size / GB:.0f} GB, {capability}, driver {driver}"
    try:
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        assert (ones @ ones).sum().item() == 64**3, "wrong product"
    except (RuntimeError, AssertionError) as error:
        broken = f"{found}; doesn't compute: {first_line(error)}"
        return Finding(name, "missing", broken, "hide it: CUDA_VISIBLE_DEVICES=")
    if properties.major < 8:
        return Finding(name, "look", found, "has no bf16: slow, or out of range, on dev and klein")
    if too_big := [f"{base} ({need / GB:.0f} GB)" for base, need in FROZEN.items() if need > size]:
        return Finding(name, "look", found, f"too small for bf16 weights of {', '.join(too_big)}")
    return Finding(name, "OK", found)


def check_bitsandbytes() -> Iterator[Finding]:
    """One step of the 8-bit optimizer on the device that training would use."""
    import bitsandbytes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.nn.Parameter(torch.ones(8192, device=device))  # under 4096: fp32 moments
    weight.grad = weight.detach()
    bitsandbytes.optim.AdamW8bit([weight], lr=0.1).step()
    assert (weight < 1).all(), f"a wrong step on {device}"
    yield Finding("8-bit optimizer", "OK", f"steps on {device}")


def available_memory() -> int:
    """Bytes that a new process can have, a container's limit included."""
    import psutil

    available, limit = psutil.virtual_memory().available, Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    return available if text == "max" else min(available, int(text))


def check_memory(available: float) -> Finding:
    """RAM that is free now."""
    todo = f"the toy base needs {TOY_MEMORY / GB} GB: close other programs"
    found = f"{available / GB:.1f} GB available"
    enough = available >= TOY_MEMORY
    return Finding("RAM", "OK", found) if enough else Finding("RAM", "missing", found, todo)


def check_disk(name: str, folder: Path, *, need: float, lacking: State, todo: str) -> Finding:
    """Free space, and the right to write, where `folder` is or would be made."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        return Finding(name, lacking, f"can't write to {place}", todo)
    free = shutil.disk_usage(place).free
    found = f"{free / GB:.0f} GB free in {place}"
    return Finding(name, "OK", found) if free >= need else Finding(name, lacking, found, todo)


def check_hub(*, online: bool) -> Iterator[Finding]:
    """Login, offline mode, room for downloads; with `online`, the licence of FLUX.2-dev."""
    import huggingface_hub
    from huggingface_hub import constants

    if huggingface_hub.get_token():
        yield Finding("hub login", "OK", "a token is there")
    else:
        yield Finding("hub login", "look", "no token", f"for {GATED}: `hf auth login`")
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub mode", "look", "offline", "unset HF_HUB_OFFLINE to download a base")
    hub, todo = (
        Path(constants.HF_HUB_CACHE),
        f"{GATED} needs {DEV_DOWNLOAD / GB:.0f} GB; see HF_HOME",
    )
    yield check_disk("disk, hub", hub, need=DEV_DOWNLOAD, lacking="look", todo=todo)
    if online:
        yield check_licence()


def check_licence() -> Finding:
    """Whether this login may download FLUX.2-dev, asked of the hub."""
    import httpx
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(GATED, "model_index.json"), timeout=ONLINE_TIMEOUT)
    except errors.GatedRepoError:
        todo = f"log in and accept the licence at https://huggingface.co/{GATED}"
        return Finding("licence", "look", f"no access to {GATED}", todo)
    except (OSError, httpx.HTTPError) as error:
        return Finding("licence", "look", first_line(error), "try again later")
    return Finding("licence", "OK", f"{GATED} can be downloaded")
