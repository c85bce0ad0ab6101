"""The schema of a training config: every setting, its range, its default and its meaning.

Owns what a valid config is, alone and across fields; the adapter's and the optimizer's sections
are `adapter`'s. Doesn't read files (`reading` does) and doesn't know torch. A module
receives its own section, never the root.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from train.config.adapter import LoraConfig, OptimConfig
from train.config.machine import MemoryConfig, SpeedConfig
from train.config.schema import (
    Count,
    FileName,
    Fraction,
    Home,
    Natural,
    Pixels,
    Positive,
    Section,
    Text,
    conflict,
)
from train.config.watch import PreviewConfig, TrackConfig, ValidationConfig

AdapterDtype = Literal["bf16", "fp16", "fp32"]
"""That adapter files are written in."""


class BaseConfig(Section):
    """The frozen model that the adapter is trained on."""

    model: Home = "dev"
    """dev, klein-4b, klein-9b, toy, a folder in diffusers' layout, or a hub repository."""
    revision: Text | None = None
    """Commit, branch or tag of a hub repository; none means its main branch."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of the frozen weights. LoRA weights are fp32 always."""
    transformer: Home | None = None
    """One .safetensors file of the transformer alone, as ComfyUI ships it (bf16 or scaled fp8), in
    place of the base's own. The base's other parts are still the model's."""
    quantize: Literal["none", "fp8", "int8", "nf4"] = "none"
    """How the frozen weights of the transformer's blocks are kept: as they are, in 8 bits with a
    scale for each row, or in 4 bits. The matrix products stay in dtype."""
    allow_distilled: bool = False
    """Train on a step-distilled checkpoint all the same; expect grey, generic pictures."""


class DataConfig(Section):
    """Pictures and captions, and how they are sized."""

    path: Home
    """Folder of pictures with .txt captions beside them, or with a metadata.jsonl or .csv; kohya's
    and ai-toolkit's folders, too. A relative path starts at the current directory, not at the
    config."""
    trigger: Text | None = None
    """The word that calls the subject; see trigger_mode."""
    trigger_mode: Literal["require", "prepend", "optional"] = "require"
    """require: a caption without the trigger is an error. prepend: it is put first there. optional:
    it stays as it is, for ordinary pictures beside the subject's, which keep the rest as it was."""
    missing_captions: Literal["error", "trigger"] = "error"
    """What to do with a picture that has no caption: stop, or caption it with the trigger alone."""
    bad_pictures: Literal["error", "skip"] = "error"
    """What to do with a picture that can't be used: stop and list all, or skip it and report it."""
    resolution: Pixels | tuple[Pixels, ...] = 1024
    """Target area of a bucket: about resolution x resolution pixels. A list trains every picture at
    each of them, such as [512, 768, 1024]; an epoch is then as many times longer."""
    equal_tokens: bool = False
    """Buckets of a resolution all have the same number of tokens, so that a compiled model sees one
    shape; there are fewer of them, so more is cropped."""
    max_upscale: Annotated[float, Field(ge=1.0, le=4.0)] = 1.0
    """Largest enlargement of a picture; a smaller picture gets a smaller bucket instead."""
    max_aspect: Annotated[float, Field(ge=1.0, le=8.0)] = 3.0
    """Longest side over shortest side of a bucket; a longer picture is cropped to it."""
    repeats: Count = 1
    """How often an epoch shows each picture."""
    flip: bool = False
    """Mirror half of the showings left to right. Never for text, logos or one-sided characters."""
    caption_dropout: Fraction = 0.05
    """Fraction of the showings that use the empty prompt instead of the caption."""
    mask: Literal["none", "alpha", "files"] = "none"
    """Which part of a picture is learnt. alpha: its opaque part. files: where the grey picture
    NAME.mask.png beside it is white; a picture without one counts everywhere."""
    mask_floor: Fraction = 0.1
    """What masked-out parts still count for, against 1 for the rest."""
    loss_weight: Positive = 1.0
    """What a picture's loss counts for; below 1 for regularisation pictures."""
    share: Positive | None = None
    """Of the pictures shown, this set's part against the shares of the other sets in more_data, at
    any step. None: by its pictures times repeats, so that all sets end their epochs together."""

    @property
    def resolutions(self) -> tuple[int, ...]:
        """All of them, one or more."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)

    @field_validator("resolution")
    @classmethod
    def _resolutions_differ(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(value, tuple) and len(set(value)) != max(1, len(value)):
            fault = "names one size twice" if value else "the list of sizes is empty"
            raise PydanticCustomError("conflict", "{text}", {"text": fault})
        return value

    @model_validator(mode="after")
    def _mask_is_there(self) -> Self:
        if self.mask == "none" and "mask_floor" in self._changed():
            raise conflict({"mask_floor": "has no effect with mask: none; remove it"})
        return self

    @model_validator(mode="after")
    def _trigger_is_there(self) -> Self:
        needs = {"trigger_mode": "prepend", "missing_captions": "trigger"}
        if self.trigger is None and (
            problems := {
                key: f"is '{value}' but data.trigger is not set"
                for key, value in needs.items()
                if getattr(self, key) == value
            }
        ):
            raise conflict(problems)
        return self


class EncodeConfig(Section):
    """How prompts are encoded, and kept in the cache."""

    text_quantize: Literal["none", "int8", "nf4"] = "none"
    """Weights of the text encoder: as they are, or in 8 or 4 bits by bitsandbytes where it doesn't
    fit otherwise. The embeddings differ then from those that pictures are made with."""
    text_storage: Literal["full", "8bit"] = "full"
    """8bit halves the text cache; its embeddings are off by about 0.6 %."""


class FlowConfig(Section):
    """Which noise levels are trained, and what the model is told."""

    sampling: Literal["logit-normal", "uniform"] = "logit-normal"
    """Density of sigma before the shift."""
    mean: float = 0.0
    """Mean of the logit-normal density."""
    std: Positive = 1.0
    """Standard deviation of the logit-normal density."""
    shift: Literal["tokens", "none"] | Positive = "tokens"
    """tokens: FLUX.1's shift by the picture's true token count (1.88 at 512x512, 3.16 at
    1024x1024). none: no shift. A number: that fixed shift."""
    guidance: Annotated[float, Field(ge=1.0, le=10.0)] = 1.0
    """Embedded guidance in training, on bases that have it. 1.0 is the true velocity."""

    @model_validator(mode="after")
    def _density_is_used(self) -> Self:
        unused = [key for key in ("mean", "std") if key in self._changed()]
        if self.sampling == "uniform" and unused:
            raise conflict(dict.fromkeys(unused, "has no effect with sampling: uniform; remove it"))
        return self


class TrainConfig(Section):
    """How long, and in what portions."""

    steps: Count
    """Optimizer steps."""
    batch_size: Count = 1
    """Pictures a device takes at once; all of one bucket."""
    accumulate: Count = 1
    """Batches whose gradients are added up for one step."""
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay a step of a running average of the adapter, such as 0.999, which previews and the
    export then show; the first steps decay faster. None: no average."""
    checkpoint_every: Count = 250
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: Count = 4
    """Older checkpoints are deleted; the newest is never."""
    log_every: Count = 10
    """Steps between lines on the console; the JSONL has every step."""


class ExportConfig(Section):
    """Which adapter is exported, and what its file says of itself."""

    checkpoint: Literal["auto", "best", "last"] = "auto"
    """best: by the loss on held-out pictures. auto: the best where pictures are held out, otherwise
    the last."""
    dtype: AdapterDtype = "bf16"
    """Type of the exported weights."""
    weights: Literal["average", "last"] = "average"
    """What the file and the previews hold: the average where train.ema or schedulefree keeps one,
    else the last weights. last: those even so."""
    title: str | None = None
    """Shown by programs that read ModelSpec metadata; none means the run's name."""
    author: str | None = None
    """Shown by programs that read ModelSpec metadata."""
    description: str | None = None
    """Shown by programs that read ModelSpec metadata."""


class Config(Section):
    """A whole training config."""

    name: FileName
    """Name of the run, its folder and its adapter file."""
    output: Home = "runs"
    """Folder that holds the runs. A relative path starts at the current directory."""
    cache: Home = "cache"
    """Folder that holds encoded pictures and captions, shared by all runs. A relative path starts
    at the current directory."""
    seed: Natural = 0
    """Covers initialisation, order, noise, dropout and flips."""
    base: BaseConfig = BaseConfig()
    """The frozen model."""
    data: DataConfig
    """Pictures and captions."""
    more_data: tuple[DataConfig, ...] = ()
    """Further data sets trained along with it: regularisation pictures, other subjects."""
    encode: EncodeConfig = EncodeConfig()
    """How prompts become cache entries."""
    lora: LoraConfig = LoraConfig()
    """The adapter's size, and where it attaches."""
    flow: FlowConfig = FlowConfig()
    """Noise levels."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    train: TrainConfig
    """Steps, batches, checkpoints."""
    memory: MemoryConfig = MemoryConfig()
    """Fitting the GPU."""
    speed: SpeedConfig = SpeedConfig()
    """Faster steps."""
    preview: PreviewConfig = PreviewConfig()
    """Pictures made while training."""
    validation: ValidationConfig = ValidationConfig()
    """The loss on held-out pictures."""
    track: TrackConfig = TrackConfig()
    """Metrics."""
    export: ExportConfig = ExportConfig()
    """The adapter file."""

    @property
    def sets(self) -> tuple[DataConfig, ...]:
        """All data sets, the main one first."""
        return (self.data, *self.more_data)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        problems = {}
        shares = [data.share for data in self.sets]
        if not self.more_data and self.data.share is not None:
            problems["data.share"] = "has no effect without more_data; remove it"
        elif None in shares and any(shares):
            problems["data"] = "share must be set in data and in all of more_data, or in none"
        if self.optim.warmup >= self.train.steps:
            problems["optim.warmup"] = (
                f"is {self.optim.warmup} but train.steps is {self.train.steps}: "
                "the learning rate would never reach its peak"
            )
        if self.speed.fp8_matmul and self.base.quantize != "fp8":
            problems["speed.fp8_matmul"] = (
                f"needs base.quantize: fp8, not '{self.base.quantize}'; set that or remove this"
            )
        if self.base.quantize != "none" and self.lora.init == "pissa":
            problems["lora.init"] = (
                f"pissa needs the base's own weights, not base.quantize: {self.base.quantize}; "
                "remove one of the two"
            )
        problems |= self._kind_problems()
        problems |= self._average_problems()
        if not self.preview.texts:
            unused = "has no effect without preview.prompts or edits; remove it or add some"
            problems |= {f"preview.{key}": unused for key in self.preview._changed()}
        if self.export.checkpoint == "best" and self.validation.pictures in ("training", "off"):
            problems["export.checkpoint"] = (
                f"needs held-out pictures; validation.pictures is '{self.validation.pictures}'"
            )
        if "neutral_prompts" in self.validation._changed():  # of the defaults, such are left out
            prompts = "\n".join(self.validation.neutral_prompts)
            for trigger in filter(None, (data.trigger for data in self.sets)):
                if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", prompts):
                    problems["validation.neutral_prompts"] = f"has the trigger '{trigger}'"
        if problems:
            raise conflict(problems)
        return self

    def _kind_problems(self) -> dict[str, str]:
        """What a kind of adapter can't have."""
        problems = {}
        if self.lora.kind == "dora" and self.base.quantize != "none":
            problems["lora.kind"] = (
                f"dora trains the lengths of the base's rows, and those of base.quantize: "
                f"{self.base.quantize} aren't those of the weights that the file is used with; use "
                "lora or lokr, or remove base.quantize"
            )
        if self.lora.kind == "dora" and self.optim.name == "muon":
            problems["optim.name"] = "muon is for matrices, but dora's magnitudes are vectors"
        if self.lora.kind == "lokr" and self.base.quantize == "nf4":
            problems["lora.kind"] = (
                "lokr can't be loaded onto base.quantize: nf4, since peft asks the weights for "
                "their shape, which nf4 packs; use fp8 or int8, or lora"
            )
        if self.lora.kind == "lokr" and self.optim.lora_plus is not None:
            problems["optim.lora_plus"] = "is for up matrices, which lora.kind: lokr doesn't have"
        return problems

    def _average_problems(self) -> dict[str, str]:
        """What is wrong with the settings about averaged weights."""
        averages = self.optim.name == "schedulefree"
        problems = {}
        if averages and self.train.ema is not None:
            problems["train.ema"] = "isn't needed with optim.name: schedulefree, an average itself"
        if self.export.weights == "last" and averages:
            problems["export.weights"] = (
                "must be average with optim.name: schedulefree: where it takes its gradients is no "
                "place for pictures"
            )
        elif self.export.weights == "last" and self.train.ema is None:
            problems["export.weights"] = "has no effect without train.ema; remove it"
        return problems
