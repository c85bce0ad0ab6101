"""Where metrics go beside the run's own files: Weights & Biases, TensorBoard, Trackio.

Owns how each is started and told. They are asked directly, not through accelerate's trackers: those
take no captions for pictures, no nested settings in TensorBoard, and can't go on without a server.

What starts here may fail later, when a server or a disk is gone. A run isn't lost for that:
`Guarded` says it once and goes on without; metrics.jsonl has everything anyway.
"""

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL.Image import Image

from train.config import TrackConfig
from train.errors import MachineError

WANDB_ID = "wandb-id.txt"
TENSORBOARD = "tensorboard"

SERVER_PATIENCE = 30
"""Seconds that Weights & Biases has to answer before a run goes on offline."""
UPLOAD_PATIENCE = 600
"""Seconds that the end of a run waits for uploads."""

LONGEST_TAG = 80
"""Characters of a caption in TensorBoard, where it is a name."""


class Sink(Protocol):
    """Something that is told what a run does."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Figures after a step; `/` in a name puts it into a group."""
        ...

    def pictures(self, step: int, pictures: Sequence[Image], captions: Sequence[str]) -> None:
        """Previews, in the same order in every call."""
        ...

    def histogram(self, name: str, values: Sequence[float]) -> None:
        """How values are spread, known before the first step."""
        ...

    def close(self) -> None:
        """Send or write what is left."""
        ...


def start(
    track: TrackConfig,
    folder: Path,
    *,
    name: str,
    settings: dict[str, Any],
    done: int,
    say: Callable[[str], None],
) -> list[Sink]:
    """What the config asks for. done: steps that a resumed run has behind it.

    Raises MachineError for a package that isn't installed or a key that Weights & Biases lacks.
    """
    sinks: list[Sink] = []
    if track.wandb != "off":
        sink = WandbSink(folder, track, name=name, settings=settings, say=say)
        sinks.append(Guarded(sink, "Weights & Biases", say=say))
    if track.tensorboard:
        sinks.append(Guarded(TensorBoardSink(folder, settings, done), "TensorBoard", say=say))
    if track.trackio:
        sink = TrackioSink(track.project, name=name, settings=settings)
        sinks.append(Guarded(sink, "Trackio", say=say))
    return sinks


class Guarded:
    """A sink that may fail: then it is told nothing more, and the user is told once."""

    def __init__(self, sink: Sink, name: str, *, say: Callable[[str], None]) -> None:
        self._sink: Sink | None = sink
        self._name, self._say = name, say

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """See Sink."""
        self._try(lambda sink: sink.scalars(step, values))

    def pictures(self, step: int, pictures: Sequence[Image], captions: Sequence[str]) -> None:
        """See Sink."""
        self._try(lambda sink: sink.pictures(step, pictures, captions))

    def histogram(self, name: str, values: Sequence[float]) -> None:
        """See Sink."""
        self._try(lambda sink: sink.histogram(name, values))

    def close(self) -> None:
        """See Sink."""
        self._try(lambda sink: sink.close())

    def _try(self, tell: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            tell(self._sink)
        except Exception as error:  # whatever a client raises when its server or disk is gone
            self._sink = None
            self._say(
                f"{self._name}: {error or type(error).__name__}; nothing more goes there. "
                "Training goes on, and the run's folder has all figures."
            )


class WandbSink:
    """A run in Weights & Biases.

    Its own step counter only goes up and drops what a resumed run does again, so our step is a
    figure beside the others, which all are drawn over.
    """

    def __init__(
        self,
        folder: Path,
        track: TrackConfig,
        *,
        name: str,
        settings: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        try:
            import wandb
            from wandb.errors import CommError
        except ImportError:
            raise _missing("wandb", f"'{track.wandb}'", "off") from None
        self._wandb = wandb

        def begin(mode: Literal["online", "offline"]) -> Any:
            return wandb.init(
                project=track.project,
                name=name,
                id=_wandb_id(folder / WANDB_ID),
                resume="allow",
                dir=folder,
                mode=mode,
                config=settings,
                settings=wandb.Settings(
                    init_timeout=SERVER_PATIENCE,
                    # with any patience set, an offline run ends before its file is written
                    finish_timeout=UPLOAD_PATIENCE if mode == "online" else 0,
                ),
            )

        assert track.wandb != "off"
        try:
            self._run = begin(track.wandb)
        except CommError as error:
            say(
                f"track.wandb: the server can't be reached ({error}). The run is recorded offline "
                f"in {folder / 'wandb'}; `wandb sync` sends it later."
            )
            wandb.teardown()  # its service still holds the run
            self._run = begin("offline")
        except wandb.Error as error:
            raise MachineError(
                f"track.wandb: {error}. `wandb login` sets the key; "
                "track.wandb: offline needs none."
            ) from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """See Sink."""
        self._run.log({"step": step, **values})

    def pictures(self, step: int, pictures: Sequence[Image], captions: Sequence[str]) -> None:
        """See Sink."""
        pairs = zip(pictures, captions, strict=True)
        images = [self._wandb.Image(picture, caption=caption) for picture, caption in pairs]
        self._run.log({"step": step, "previews": images})

    def histogram(self, name: str, values: Sequence[float]) -> None:
        """See Sink."""
        self._run.log({name: self._wandb.Histogram(list(values))})

    def close(self) -> None:
        """See Sink."""
        self._run.finish()


class TensorBoardSink:
    """Event files in the run's folder; a resumed run hides the steps that it does again."""

    def __init__(self, folder: Path, settings: dict[str, Any], done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard", "true", "false") from None
        purge = done + 1 if done else None
        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge)
        if not done:
            self._writer.add_text("config", "\n".join(f"    {row}" for row in _rows(settings)))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """See Sink."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)

    def pictures(self, step: int, pictures: Sequence[Image], captions: Sequence[str]) -> None:
        """See Sink. The caption is in the name, which is all that TensorBoard shows."""
        for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            tag = f"previews/{number} {caption}"[:LONGEST_TAG]
            pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image(tag, pixels, global_step=step, dataformats="HWC")
        self._writer.flush()

    def histogram(self, name: str, values: Sequence[float]) -> None:
        """See Sink."""
        self._writer.add_histogram(name, np.asarray(values), global_step=0)

    def close(self) -> None:
        """See Sink."""
        self._writer.close()


class TrackioSink:
    """A run in Trackio, which keeps it on this machine."""

    def __init__(self, project: str, *, name: str, settings: dict[str, Any]) -> None:
        try:
            import trackio  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise _missing("trackio", "true", "false") from None
        self._trackio = trackio
        trackio.init(project=project, name=name, config=settings, resume="allow", embed=False)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """See Sink."""
        self._trackio.log(values, step=step)

    def pictures(self, step: int, pictures: Sequence[Image], captions: Sequence[str]) -> None:
        """See Sink."""
        named = {
            f"previews/{number}": self._trackio.Image(picture, caption=caption)
            for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True))
        }
        self._trackio.log(named, step=step)

    def histogram(self, name: str, values: Sequence[float]) -> None:
        """See Sink."""
        counts, edges = np.histogram(values, bins=20)
        rows = zip(edges[:-1], counts, strict=True)
        shares = {f"{name}/{edge:.2f}": float(count) for edge, count in rows}
        self._trackio.log(shares, step=0)

    def close(self) -> None:
        """See Sink."""
        self._trackio.finish()


def _missing(package: str, value: str, off: str) -> MachineError:
    return MachineError(
        f"track.{package} is {value} but {package} isn't installed: "
        f"pip install {package}, or set track.{package}: {off}"
    )


def _wandb_id(path: Path) -> str:
    """The run's id in Weights & Biases, so that a resumed run goes on with its own curves."""
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _rows(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """`section.key: value` for each setting."""
    rows = []
    for key, value in tree.items():
        nested = isinstance(value, dict)
        rows += _rows(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}: {value}"]
    return rows
