"""The sections of a config that say what is trained and how: the adapter and its optimizer.

Owns their settings and what must agree within each. Other sections, and what must agree across
them, are `config`'s.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from train.config.schema import Below1, Natural, Positive, Section, conflict

LEAST_FACTOR = 0.1
"""Prodigy's lr is a factor around 1; below this it can only be meant as another's rate."""

UNUSED = {
    "lion8bit": ("eps",),
    "adafactor": ("betas", "eps"),
    "muon": ("betas", "eps"),
}
"""Settings that an optimizer doesn't have."""


class LoraConfig(Section):
    """The adapter."""

    kind: Literal["lora", "dora", "lokr"] = "lora"
    """lora: a weight's update is a product of two low-rank matrices. dora: and the length of each
    of its rows is trained for itself; a file for diffusers and another one for ComfyUI. lokr: the
    update is a Kronecker product of a small matrix and a large one, itself of low rank."""
    targets: Literal["attention", "blocks", "diffusers"] | tuple[str, ...] = "blocks"
    """blocks: all Linears of all blocks. attention: their attention. diffusers: that library's
    default set. Or a list of regular expressions on module names, each of which must match."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of each update; of lokr's large matrix, which is whole where that is no larger."""
    factor: Annotated[int, Field(ge=2, le=64)] = 8
    """Rows and columns of lokr's small matrix; the large one has so many times fewer than the
    weight. Must divide all that is adapted."""
    alpha: Positive | None = None
    """Strength of the update is alpha / rank; none means alpha = rank, so strength 1."""
    rslora: bool = False
    """Strength alpha / sqrt(rank) instead (rsLoRA), so that one alpha suits all ranks."""
    dropout: Below1 = 0.0
    """Dropout on the adapter's input."""
    init: Literal["default", "pissa", "eva"] = "default"
    """default: down random, up zero. pissa: both start as the main directions of the weight that
    they update, which is taken off again, so the first picture is the base's here too. Costs a
    second, frozen branch in each step and twice the rank in the exported file. eva: down starts as
    the main directions of what the weight is given, found in passes over the first pictures before
    the first step; up zero."""
    compute: Literal["base", "fp32"] = "base"
    """Type that the update is computed in. base: the base's, as in inference, from fp32 weights.
    fp32: as peft does it, and always for dora and lokr; far more memory on a bf16 base."""

    @property
    def scale(self) -> float:
        """Strength of the update, alpha / rank or alpha / sqrt(rank)."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / self.rank**0.5 if self.rslora else alpha / self.rank

    @field_validator("targets")
    @classmethod
    def _patterns_compile(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if value == ():
            raise conflict({"": "the list of patterns is empty"})
        for pattern in () if isinstance(value, str) else value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise conflict({"": f"{pattern!r} isn't a regular expression: {error}"}) from None
        return value

    @model_validator(mode="after")
    def _rslora_has_alpha(self) -> Self:
        if self.rslora and self.alpha is None:
            raise conflict({"rslora": "needs lora.alpha: the strength is alpha / sqrt(rank)"})
        return self

    @model_validator(mode="after")
    def _kind_can(self) -> Self:
        problems = {}
        if self.kind != "lokr" and "factor" in self._changed():
            problems["factor"] = f"has no effect with kind: {self.kind}; remove it"
        if self.kind == "lokr" and self.init != "default":
            problems["init"] = f"{self.init} starts a down matrix, which lokr doesn't have"
        if self.kind == "lokr" and self.rslora:
            problems["rslora"] = "is a strength for low-rank products, which lokr isn't; set alpha"
        if self.kind == "dora" and self.init == "pissa":
            problems["init"] = "pissa takes its start off the output, dora scales whole weights"
        if self.kind != "lora" and "compute" in self._changed():
            problems["compute"] = f"is fp32 with kind: {self.kind}, whatever it says; remove it"
        if self.kind != "lora" and self.dropout:
            problems["dropout"] = f"{self.kind} has no input of its own to drop; remove it"
        if problems:
            raise conflict(problems)
        return self


class OptimConfig(Section):
    """The optimizer and its schedule."""

    name: Literal[
        "adamw",
        "adamw8bit",
        "paged_adamw8bit",
        "lion8bit",
        "adafactor",
        "prodigy",
        "schedulefree",
        "muon",
    ] = "adamw"
    """adamw, adafactor and muon are torch's. The 8-bit ones are bitsandbytes'; paged: what the GPU
    has no room for goes to RAM, until a resume. prodigy finds its learning rate. schedulefree is
    AdamW that averages its weights in place of a schedule."""
    lr: Positive = 1e-4
    """Peak learning rate. muon and schedulefree take AdamW's, lion8bit a third or less of it,
    adafactor about 1e-2 (times the size of the weights); prodigy a factor on what it finds, 1."""
    lora_plus: Annotated[float, Field(ge=1.0)] | None = None
    """LoRA+: lr of the up matrices (lora_B) over that of the down ones; 16 is its authors'."""
    betas: tuple[Below1, Below1] = (0.9, 0.99)
    """Decay of the two moments."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: constant, or down to the floor at the last step."""
    restarts: Natural = 0
    """How often cosine starts again from the peak, at equal distances."""
    floor: Below1 = 0.0
    """Where cosine and linear end, as a fraction of the peak."""
    warmup: Natural = 0
    """Steps over which the learning rate rises linearly to its peak."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        changed = self._changed()
        unused = [key for key in UNUSED.get(self.name, ()) if key in changed]
        problems = dict.fromkeys(unused, f"has no effect with name: {self.name}; remove it")
        if self.restarts and self.schedule != "cosine":
            problems["restarts"] = f"has no effect with schedule: {self.schedule}; remove it"
        if self.floor and self.schedule == "constant":
            problems["floor"] = "has no effect with schedule: constant; remove it"
        if problems:
            raise conflict(problems)
        return self

    @model_validator(mode="after")
    def _optimizer_can(self) -> Self:
        problems = {}
        if self.name == "prodigy" and self.lr < LEAST_FACTOR:
            problems["lr"] = (
                f"is {self.lr:g}, but prodigy finds the rate itself and takes this as a factor "
                "on it; set 1.0"
            )
        if self.name == "prodigy" and self.lora_plus is not None:
            problems["lora_plus"] = "prodigy has one rate for all weights; remove it"
        if self.name == "schedulefree" and self.schedule != "constant":
            problems["schedule"] = f"is {self.schedule}, but schedulefree needs constant"
        if self.name == "schedulefree" and self.betas[0] == 0:
            problems["betas"] = "the first can't be 0 with schedulefree, which averages by it"
        if problems:
            raise conflict(problems)
        return self
