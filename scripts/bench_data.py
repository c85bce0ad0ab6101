"""The data tools: pictures a second of inspect beside a bare Pillow loop, and of what follows it.

Each measurement has a process of its own, on as many cores as asked for. All files have been read
once before, so that both sides find them in the operating system's memory. Processor time and
memory are those of the process and of all that it starts.
"""

import io
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout, suppress
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any, NamedTuple

import psutil

from scripts import bench_pictures
from scripts.bench_report import ratios, spread
from train.usage import peak_ram

RESOLUTION = 1024
ENCODED_AT = 256
"""Pixels that the toy VAE encodes at: larger pictures measure nothing but its convolutions."""
HEADER = ("data", "pictures", "seconds", "pictures/s", "core ms each", "peak MB")
BARE, INSPECT, PAGE = "bare Pillow", "inspect", "inspect, with page and JSON"


def measure(
    folder: Path, *, pictures: int, plans: int, encode: int, runs: int, cores: int
) -> dict[str, Any]:
    """All phases. seconds: of `runs` turns where sides are compared; cpu: seconds of all cores,
    starts included, the least of the turns; peak: the most RAM.

    The quarter shows whether memory grows with the number of pictures.
    """
    root = bench_pictures.photos(folder, count=pictures)
    rows = bench_pictures.records(folder, count=plans)
    for path in root.rglob("*.jpg"):
        path.read_bytes()
    quarter = root / "0"
    of_quarter = len(list(quarter.glob("*.jpg")))
    jobs: dict[str, tuple[int, Callable, tuple]] = {
        BARE: (pictures, bare, (root,)),
        INSPECT: (pictures, inspect, (root, False)),
        f"{INSPECT}, a quarter of them": (of_quarter, inspect, (quarter, False)),
        PAGE: (pictures, inspect, (root, True)),
        f"{PAGE}, a quarter": (of_quarter, inspect, (quarter, True)),
        "bucketing": (pictures, bucket, (pictures,)),
        f"toy encoding at {ENCODED_AT} pixels": (encode, encode_some, (root, encode)),
        "plan, without decoding": (plans, plan, (rows,)),
    }
    samples: dict[str, list[Cost]] = {kind: [] for kind in jobs}
    for turn in range(runs):
        for kind, (_, job, arguments) in jobs.items():
            if turn == 0 or kind in (BARE, INSPECT, PAGE):
                samples[kind].append(alone(job, *arguments, cores=cores))
    phases = {
        kind: {
            "pictures": jobs[kind][0],
            "seconds": spread([cost.seconds for cost in turns]),
            "cpu": min(cost.cpu for cost in turns),
            "peak": max(cost.peak for cost in turns),
        }
        for kind, turns in samples.items()
    }
    theirs = phases[BARE]["seconds"]["samples"]
    faster = {side: ratios(theirs, phases[side]["seconds"]["samples"]) for side in (INSPECT, PAGE)}
    return {"cores": cores, "phases": phases, "times as fast as bare Pillow": faster}


class Cost(NamedTuple):
    """Of a job: seconds, seconds of all cores, bytes of RAM at most."""

    seconds: float
    cpu: float
    peak: int


def alone(job: Callable, *arguments: object, cores: int) -> Cost:
    """What a job costs in a process that starts for it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run_alone, job, *arguments, cores=cores).result()


def run_alone(job: Callable, *arguments: object, cores: int) -> Cost:
    """In the process: from before the job's imports to its end."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    with Family() as family:
        began = time.perf_counter()
        seconds = job(*arguments)
        return Cost(seconds or time.perf_counter() - began, *family.costs())


class Family:
    """This process and those that it starts, watched from a thread while the context lasts.

    Of the others the last tenth of a second is missed.
    """

    def __init__(self) -> None:
        self._began = time.process_time()
        self._cpu: dict[int, float] = {}
        self._peak = 0
        self._over = Event()
        self._thread = Thread(target=self._watch)

    def __enter__(self) -> "Family":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def costs(self) -> tuple[float, int]:
        """Seconds of all cores and bytes of RAM so far."""
        cpu = time.process_time() - self._began + sum(self._cpu.values())
        return cpu, max(self._peak, peak_ram())

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._over.wait(0.1):
            others = me.children(recursive=True)
            held = 0
            for process in others:
                with suppress(psutil.Error):  # it may end meanwhile
                    times, memory = process.cpu_times(), process.memory_full_info()
                    self._cpu[process.pid] = times.user + times.system
                    held += memory.pss if psutil.LINUX else memory.uss  # what is shared, once
            if others:
                self._peak = max(self._peak, held + me.memory_info().rss)


# ---- the jobs


def bare(root: Path) -> None:
    """What anyone would write first: open and decode every picture."""
    from PIL import Image

    for path in sorted(root.rglob("*.jpg")):
        with Image.open(path) as image:
            image.load()


def inspect(root: Path, page: bool) -> None:
    """All of `kindling inspect`, from its imports to its last line."""
    from data_tools.inspect import command as inspect

    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        outputs = ["--html", f"{folder}/x.html", "--json", f"{folder}/x.json"] if page else []
        status = inspect.main([str(root), "--resolution", str(RESOLUTION), *outputs])
    assert status == 0


def bucket(count: int) -> float:
    """Only the choice of sizes, for pictures of all shapes."""
    import random

    from data_tools import buckets
    from train.config import DataConfig

    draw = random.Random(0).randint
    sized = [buckets.Geometry(draw(600, 4000), draw(600, 4000)) for _ in range(count)]
    data = DataConfig(path="x", resolution=RESOLUTION)
    began = time.perf_counter()
    buckets.plan(sized, data=data)
    return time.perf_counter() - began


def encode_some(root: Path, count: int) -> float:
    """From files to the cache with the toy base's VAE; loading it doesn't count."""
    import torch

    from data_tools import buckets, records
    from train.config import BaseConfig, DataConfig
    from train.encoding import encode
    from train.encoding.cache import Cache, FileDigests
    from train.loading import base

    data = DataConfig(path=str(root / "0"), resolution=ENCODED_AT, missing_captions="error")
    found = list(records.survey(data, proven=Everything(), progress=False).records)[:count]
    places = buckets.plan(found, data=data).placements
    wanted = [
        encode.Picture(record.target, record.sha256, place.geometry)
        for record, place in zip(found, places, strict=True)
    ]
    toy = base.resolve(BaseConfig(model="toy", dtype="fp32"))
    with TemporaryDirectory() as folder:
        cache = Cache(Path(folder))
        keys = encode.Keys.of(toy, digests=FileDigests(cache.root / "digests.json"))
        options = {"keys": keys, "cache": cache, "device": torch.device("cpu")}
        encode.encode_pictures(toy, wanted[:1], **options)
        began = time.perf_counter()
        assert encode.encode_pictures(toy, wanted[1:], **options) == count - 1
        return (time.perf_counter() - began) * count / (count - 1)


def plan(root: Path) -> None:
    """Folder, metadata, hashes, headers, table and buckets, of pictures known to decode."""
    from data_tools import buckets, records
    from train.config import DataConfig

    data = DataConfig(path=str(root), resolution=RESOLUTION)
    collection = records.read(data, proven=Everything(), progress=False)
    buckets.plan(collection.records, data=data)


class Everything:
    """Holds whatever is asked for: every picture is proven."""

    def __contains__(self, item: object) -> bool:
        return True


def rows(results: dict[str, Any]) -> Sequence[tuple[str, ...]]:
    """Lines of the table: medians."""
    lines = []
    for kind, phase in results["phases"].items():
        seconds = phase["seconds"]["median"]
        rate = phase["pictures"] / seconds
        each = f"{1000 * phase['cpu'] / phase['pictures']:.2f}"
        size = f"{phase['peak'] / 1e6:.0f}"
        count = f"{phase['pictures']:,}"
        lines.append((kind, count, f"{seconds:.1f}", f"{rate:,.0f}", each, size))
    for side, ratio in results["times as fast as bare Pillow"].items():
        lines.append((f"{side} / {BARE}", "", "", f"{ratio['median']:.2f}x", "", ""))
    return lines
