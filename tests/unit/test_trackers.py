"""What trackers were told, read back from what they wrote; and that none of them ends a run."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from train import trackers
from train.config import TrackConfig
from train.errors import MachineError
from train.track import Tracker, spread
from train.trackers import Guarded, Sink

SETTINGS = {"name": "tiny", "lora": {"rank": 4, "targets": ["a", "b"]}}
PROMPTS = ["zibby", "a red star"]


def previews() -> list[Image.Image]:
    return [Image.new("RGB", (32, 16), colour) for colour in ("red", "blue")]


def tell(sink: Sink) -> None:
    """What a run of two steps says."""
    sink.histogram("sigma", [0.1, 0.4, 0.4, 0.9])
    sink.pictures(0, previews(), PROMPTS)
    sink.scalars(1, {"loss": 0.5, "grad_norm/single": 2.0})
    sink.scalars(2, {"loss": 0.25})
    sink.close()


def start(folder: Path, *, done: int = 0, said: list[str] | None = None, **track: Any) -> Sink:
    """The one tracker that the settings ask for."""
    (sink,) = trackers.start(
        TrackConfig(**track),
        folder,
        name="tiny",
        settings=SETTINGS,
        done=done,
        say=(said if said is not None else []).append,
    )
    return sink


def events(folder: Path) -> Any:
    """All of a run's TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / trackers.TENSORBOARD), size_guidance={"images": 0})
    return found.Reload()


def scalars(found: Any, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_tensorboard_has_figures_pictures_sigmas_and_the_config(tmp_path):
    tell(start(tmp_path, tensorboard=True))
    found = events(tmp_path)
    assert scalars(found, "loss") == [(1, 0.5), (2, 0.25)]
    assert scalars(found, "grad_norm/single") == [(1, 2.0)]
    assert found.Tags()["images"] == ["previews/0 zibby", "previews/1 a red star"]
    picture = found.Images("previews/1 a red star")[0]
    assert (picture.step, picture.width, picture.height) == (0, 32, 16)
    assert found.Histograms("sigma")[0].histogram_value.num == 4
    (config,) = found.Tensors("config/text_summary")
    assert b"lora.rank: 4" in config.tensor_proto.string_val[0]


def test_tensorboard_hides_the_steps_that_a_resumed_run_does_again(tmp_path):
    first = start(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        first.scalars(step, {"loss": 1.0})
    first.close()
    second = start(tmp_path, tensorboard=True, done=2)
    for step in (3, 4):
        second.scalars(step, {"loss": 2.0})
    second.close()
    assert scalars(events(tmp_path), "loss") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Of an offline run's file: LevelDB's log format after seven bytes of Weights & Biases' own."""
    block, place, parts = 32768, 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
        size = int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]  # 1 whole, 2 first, 3 middle, 4 last part
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield parts
            parts = b""


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """What an offline run logged, row by row."""
    from wandb.proto import wandb_internal_pb2

    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    rows = []
    for data in wandb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
        record.ParseFromString(data)
        items = record.history.item
        if items:
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


@pytest.mark.slow
def test_wandb_offline_has_figures_and_pictures_with_their_prompts(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # another test's service may be about
    monkeypatch.setenv("WANDB_SILENT", "true")
    tell(start(tmp_path, wandb="offline", project="mine"))
    wandb.teardown()  # as at the end of a process: files are whole then
    rows = wandb_history(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(1, 0.5), (2, 0.25)]
    (shown,) = (row for row in rows if any("previews" in key for key in row))
    assert "zibby" in json.dumps(shown)
    assert len(list((tmp_path / "wandb").rglob("*.png"))) == 2


@pytest.mark.slow
def test_without_a_server_wandb_goes_on_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # so that it reads the environment anew
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(trackers, "SERVER_PATIENCE", 3)
    said: list[str] = []
    tell(start(tmp_path, wandb="online", said=said))
    wandb.teardown()  # as at the end of a process: files are whole then
    assert len(said) == 1
    assert said[0].startswith("track.wandb: the server can't be reached (")
    assert said[0].endswith(
        f"The run is recorded offline in {tmp_path / 'wandb'}; `wandb sync` sends it later."
    )
    assert [row["loss"] for row in wandb_history(tmp_path) if "loss" in row] == [0.5, 0.25]


class FakeTrackio(SimpleNamespace):
    """The part of Trackio's interface that is used, as its documentation has it."""

    def __init__(self) -> None:
        super().__init__(Image=lambda value, *, caption: (value.size, caption))
        self.calls: list[tuple[Any, ...]] = []

    def init(self, *, project: str, name: str, config: dict, resume: str, embed: bool) -> None:
        self.calls.append(("init", project, name, config, resume, embed))

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        self.calls.append(("log", step, metrics))

    def finish(self) -> None:
        self.calls.append(("finish",))


def test_trackio_is_told_as_it_wants(tmp_path, monkeypatch):
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    tell(start(tmp_path, trackio=True, project="mine"))
    assert fake.calls[0] == ("init", "mine", "tiny", SETTINGS, "allow", False)
    assert sum(fake.calls[1][2].values()) == 4  # the histogram's counts
    assert fake.calls[2:] == [
        ("log", 0, {"previews/0": ((32, 16), "zibby"), "previews/1": ((32, 16), "a red star")}),
        ("log", 1, {"loss": 0.5, "grad_norm/single": 2.0}),
        ("log", 2, {"loss": 0.25}),
        ("finish",),
    ]


@pytest.mark.parametrize(
    ("package", "module", "track", "off"),
    [
        ("trackio", "trackio", {"trackio": True}, "track.trackio: false"),
        (
            "tensorboard",
            "torch.utils.tensorboard",
            {"tensorboard": True},
            "track.tensorboard: false",
        ),
        ("wandb", "wandb", {"wandb": "offline"}, "track.wandb: off"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, module, track, off):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MachineError) as caught:
        start(tmp_path, **track)
    assert f"but {package} isn't installed: pip install {package}, or set {off}" in str(
        caught.value
    )


class Broken:
    """Fails from its second call on."""

    def __init__(self) -> None:
        self.told = 0

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.told += 1
        if self.told > 1:
            raise OSError("no space left on device")

    def pictures(self, step: int, pictures: Sequence[Image.Image], captions: Sequence[str]) -> None:
        raise AssertionError("told after it failed")

    def histogram(self, name: str, values: Sequence[float]) -> None: ...

    def close(self) -> None:
        raise AssertionError("told after it failed")


def test_a_tracker_that_fails_is_left_out_and_said_once():
    said: list[str] = []
    broken = Broken()
    sink = Guarded(broken, "TensorBoard", say=said.append)
    for step in (1, 2, 3):
        sink.scalars(step, {"loss": 1.0})
    sink.pictures(3, previews(), PROMPTS)
    sink.close()
    assert broken.told == 2
    assert said == [
        "TensorBoard: no space left on device; nothing more goes there. "
        "Training goes on, and the run's folder has all figures."
    ]


def test_the_tracker_passes_everything_on(tmp_path):
    tracker = Tracker(
        tmp_path,
        name="tiny",
        track=TrackConfig(tensorboard=True),
        settings=SETTINGS,
        start=0,
        steps=2,
        every=1,
        main=True,
    )
    tracker.sigmas([0.2, 0.3])
    tracker.previews(0, previews(), prompts=PROMPTS)
    tracker.step(1, {"loss": 0.5, "grad_norm": 0.1})
    tracker.check({"step": 1, "loss": 0.7}, scalars={"held_out/loss": 0.7}, text="checked")
    tracker.close()
    found = events(tmp_path)
    assert scalars(found, "held_out/loss") == [(1, pytest.approx(0.7))]
    assert scalars(found, "loss") == [(1, 0.5)]
    assert len(found.Tags()["images"]) == 2
    assert found.Tags()["histograms"] == ["sigma"]
    lines = (tmp_path / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.7}]


def test_checks_that_come_again_are_dropped_first(tmp_path):
    path = tmp_path / "validation.jsonl"
    for begin, kept in ((2, [0, 2]), (0, [])):
        path.write_text('{"step": 0}\n{"step": 2}\n{"step": 4}\n', encoding="utf-8")
        Tracker(
            tmp_path,
            name="tiny",
            track=TrackConfig(),
            settings={},
            start=begin,
            steps=5,
            every=1,
            main=True,
        ).close()
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in lines] == kept


def test_sigmas_as_bars():
    assert spread([0.05, 0.55, 0.55, 0.56, 1.0], bins=4) == "0 |▃ █▃| 1, half of them below 0.55"
