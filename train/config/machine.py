"""The sections of a config about the machine: fitting a GPU, and using it fast.

Owns these sections, as `config` owns the others, which imports them from here.
"""

from typing import Literal, Self

from pydantic import model_validator

from train.config.schema import Count, Natural, Positive, Section, conflict


class MemoryConfig(Section):
    """How a run fits the GPU. None of it changes what is learnt."""

    budget_gb: Positive | None = None
    """GB (10^9 bytes) of GPU memory that auto settings may use, of which they leave a small margin;
    none means what the GPU has."""
    gradient_checkpointing: Literal["all", "none", "auto"] | Count = "all"
    """Blocks whose activations are recomputed in the backward pass: far less memory, about a third
    more time. A number n: every n-th block. auto: as few as fit the budget."""
    offload_activations: bool = False
    """Keep what the recomputed blocks start from in RAM until it is needed."""
    resident_blocks: Literal["all", "auto"] | Natural = "all"
    """How many of the transformer's blocks stay on the GPU; the others' frozen weights are in RAM
    and streamed in ahead of their use. auto: as many as fit the budget."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        problems = {}
        if self.offload_activations and self.gradient_checkpointing == "none":
            fault = "has no effect with gradient_checkpointing: none; remove it"
            problems["offload_activations"] = fault
        decided = "auto" in (self.gradient_checkpointing, self.resident_blocks)
        if self.budget_gb is not None and not decided:
            problems["budget_gb"] = (
                "has no effect unless gradient_checkpointing or resident_blocks is auto; set one "
                "of them to auto, or remove it"
            )
        if problems:
            raise conflict(problems)
        return self


class SpeedConfig(Section):
    """Faster steps on a GPU, which round differently: losses differ in their last bits."""

    compile: bool = False
    """Compile the transformer's blocks with torch.compile; the first steps take minutes."""
    attention: Literal["auto", "native", "cudnn", "flash", "flash3"] = "auto"
    """Attention kernels. auto: the fastest of those that this machine has."""
    fp8_matmul: bool = False
    """Matrix products of the frozen weights in fp8, where base.quantize is fp8 and the GPU can."""
