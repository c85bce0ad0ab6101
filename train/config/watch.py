"""The sections of a config about watching a run: previews, loss on fixed pictures, metrics.

Owns these sections, as `config` owns the others, which imports them from here.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from train.config.schema import Count, Home, Natural, Pixels, Section, Text, conflict

NEUTRAL_PROMPTS = (
    "a photo of a quiet street in the rain",
    "an oil painting of a bowl of fruit",
    "a portrait of an elderly man, studio light",
    "a simple drawing of a house on a hill",
)
"""What most pictures are about, and no adapter for a character, product or style should change."""


class EditConfig(Section):
    """A preview that starts from other pictures."""

    prompt: Text
    """The instruction."""
    references: Annotated[tuple[Home, ...], Field(min_length=1)]
    """The pictures that it is about, in the order of their numbers."""


class PreviewConfig(Section):
    """Pictures made while training, with the real pipeline and fixed seeds."""

    prompts: tuple[str, ...] = ()
    """One picture each; neither these nor edits means no previews."""
    edits: tuple[EditConfig, ...] = ()
    """One picture each, drawn after those of prompts: an instruction and its reference pictures.
    Without width and height it has the shape of the first reference, at the data's resolution."""
    every: Count = 250
    """Steps between previews; there is one before the first step and one after the last."""
    seed: Natural = 0
    """Seed of the first prompt; the next ones count up."""
    width: Pixels | None = None
    """Pixels; none means the resolution of the data."""
    height: Pixels | None = None
    """Pixels; none means the resolution of the data."""
    steps: Count = 28
    """Denoising steps."""
    guidance: Annotated[float, Field(ge=0.0, le=20.0)] = 4.0
    """Guidance scale of the pipeline."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt of each picture."""
        return (*self.prompts, *(edit.prompt for edit in self.edits))

    @property
    def references(self) -> tuple[tuple[str, ...], ...]:
        """The reference pictures of each picture."""
        return (*[()] * len(self.prompts), *(edit.references for edit in self.edits))


class ValidationConfig(Section):
    """The loss on pictures that aren't trained, always at the same noise."""

    pictures: Literal["auto", "held-out", "training", "off"] = "auto"
    """auto: some of data are held out if it has 20 or more, otherwise the loss is of trained
    pictures. held-out: the same, but too few are an error. training: hold none out. off: no
    checks."""
    path: Home | None = None
    """A folder of pictures for it, captioned like those of data, such as `kindling curate` writes;
    none of data are held out then. Places, sizes and styles must be as in data, or the best
    checkpoint by this loss is the one that has learnt least (docs/experiments)."""
    fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.1
    """Of the pictures in data that are held out, but four at least, and max_pictures at most."""
    max_pictures: Annotated[int, Field(ge=4)] = 8
    """Pictures of a check; each takes `sigmas` passes forward."""
    sigmas: Annotated[int, Field(ge=1, le=64)] = 8
    """Noise levels of each picture: midpoints of equal parts of the density that is trained."""
    every: Count | None = None
    """Steps between checks; none means at checkpoints. There is one before the first step."""
    neutral_prompts: tuple[Text, ...] = NEUTRAL_PROMPTS
    """Prompts without the trigger, with which the model should stay as it was: how far it moves is
    its drift. An empty list measures none."""

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> Self:
        problems = {}
        if self.pictures == "off":
            unused = "has no effect with pictures: off; remove it"
            problems |= {key: unused for key in self._changed() if key != "pictures"}
        elif self.path is not None and self.pictures == "training":
            problems["path"] = "has no effect with pictures: training; remove one of them"
        if self.pictures == "training" or self.path is not None:
            unused = "has no effect where none of data are held out; remove it"
            problems |= {key: unused for key in self._changed() if key == "fraction"}
        if problems:
            raise conflict(problems)
        return self


class TrackConfig(Section):
    """Where metrics and previews go, beside the console and the run's folder."""

    wandb: Literal["off", "online", "offline"] = "off"
    """Weights & Biases; the key comes from `wandb login` or WANDB_API_KEY."""
    tensorboard: bool = False
    """TensorBoard files in the run's folder."""
    trackio: bool = False
    """Trackio, in the folder of its own that it keeps on this machine."""
    project: Text = "kindling"
    """Project in Weights & Biases and in Trackio."""

    @model_validator(mode="after")
    def _project_is_used(self) -> Self:
        if "project" in self._changed() and self.wandb == "off" and not self.trackio:
            raise conflict({"project": "has no effect without wandb or trackio; remove it"})
        return self
