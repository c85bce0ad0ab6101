"""What goes beside an exported adapter so that it can be used at once: a diffusers script and
ComfyUI workflows, with the adapter's name and trigger in them.

Owns which of them there are, and that none is written for a loader that wouldn't load the file as
it was trained. The graph of a workflow is `workflow`'s.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.captions import has_trigger
from train.adapters import files, workflow
from train.adapters.workflow import Drawing
from train.loading.base import DISTILLED, FEW, FULL, MAX_TEXT_TOKENS, NAMED_BASES, Inference
from train.loading.shapes import SHAPES

SNIPPET = """\
# {title}: FLUX.2 with an adapter, at strength 1. pip install diffusers peft transformers accelerate
import torch
from pathlib import Path
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained({base}, {revision}torch_dtype=torch.bfloat16)
pipe.load_lora_weights({place}, weight_name={file})
if torch.cuda.is_available():
    pipe.enable_model_cpu_offload()
picture = pipe(
    prompt={prompt},
    width={width}, height={height}, num_inference_steps={steps}, guidance_scale={guidance:g},
    {tokens}generator=torch.Generator().manual_seed(0),
).images[0]
picture.save({picture})
"""

ENDS = (".diffusers.py", ".comfyui.json", ".comfyui-4steps.json")
"""Of the files' names, after the adapter's."""

BESIDE = "str(Path(__file__).parent)"


@dataclass(frozen=True)
class Usage:
    """An exported adapter, as far as using it goes."""

    file: str
    """Name of the adapter's file."""
    pipeline: str
    """diffusers' class: Flux2Pipeline or Flux2KleinPipeline."""
    base: str
    """A name (dev, klein-4b, klein-9b, toy), a folder or a hub repository."""
    released: str | None
    """The name of the base, if the adapter has the shape of a released one; ComfyUI knows only
    those."""
    distilled: bool
    """Whether it was trained on a step-distilled checkpoint."""
    prompt: str
    """With the trigger in it."""
    side: int
    """Of a square picture, in pixels; a multiple of 16."""
    tokens: int = MAX_TEXT_TOKENS
    """Positions of a prompt."""
    weights: str | None = None
    """What the base's own weights were replaced by in training, if they were."""
    revision: str | None = None

    @property
    def inference(self) -> Inference:
        """On the base it was trained on."""
        return FEW if self.distilled else FULL


def prompt_for(trigger: str | None, examples: tuple[str, ...]) -> str:
    """A prompt that calls the adapter's subject: the first example that has the trigger, or the
    trigger alone."""
    if trigger is None:
        return next(filter(None, examples), "a lighthouse on a cliff at dusk")
    return next((text for text in examples if has_trigger(text, trigger=trigger)), trigger)


def released_as(width: int, double: int, single: int) -> str | None:
    """The released base of a shape: its width and its blocks."""
    shapes = {(s.width, s.double, s.single): name for name, s in SHAPES.items()}
    return shapes.get((width, double, single))


def diffusers_snippet(usage: Usage, *, repository: str | None = None) -> str:
    """Ten lines of Python that draw a picture with the adapter.

    repository: of the hub, that the adapter is loaded from; without it, the script's own folder.
    """
    text = SNIPPET.format(
        title=usage.file,
        pipeline=usage.pipeline,
        base=_quoted(NAMED_BASES.get(usage.base, usage.base)),
        revision=f'revision="{usage.revision}", ' if usage.revision else "",
        place=BESIDE if repository is None else _quoted(repository),
        file=_quoted(usage.file),
        prompt=_quoted(usage.prompt),
        width=usage.side,
        height=usage.side,
        steps=usage.inference.steps,
        guidance=usage.inference.guidance,
        tokens="" if usage.tokens == MAX_TEXT_TOKENS else f"max_sequence_length={usage.tokens}, ",
        picture=_quoted(f"{Path(usage.file).stem}.png"),
    )
    if usage.weights:
        text += f"# trained on {usage.weights} in place of this base's own transformer\n"
    few = DISTILLED.get(usage.released or "")
    if few and not usage.distilled:
        text += (
            f'# in 4 steps: "{few}" as the base, num_inference_steps={FEW.steps}, '
            f"guidance_scale={FEW.guidance:g}\n"
        )
    return text


def comfyui_workflows(usage: Usage) -> dict[str, dict[str, Any]]:
    """End of the file's name -> workflow: one for the base, one for klein's distilled checkpoint.

    Empty for a base that ComfyUI doesn't know.
    """
    if usage.released is None:
        return {}
    kinds = {ENDS[1]: usage.distilled}
    if usage.released in DISTILLED and not usage.distilled:
        kinds[ENDS[2]] = True
    return {end: _workflow(usage, distilled) for end, distilled in kinds.items()}


def _workflow(usage: Usage, distilled: bool) -> dict[str, Any]:
    assert usage.released is not None
    inference = FEW if distilled else FULL
    own = usage.base in (usage.released, NAMED_BASES[usage.released]) and not usage.weights
    return workflow.build(
        Drawing(
            usage.released,
            distilled,
            usage.file,
            usage.prompt,
            usage.side,
            usage.side,
            inference.steps,
            inference.guidance,
            trained_on=None if own else _public(usage),
        )
    )


def _public(usage: Usage) -> str:
    """What it was trained on, without paths of this machine: workflows are handed on."""
    if usage.weights:
        return Path(usage.weights).name
    return usage.base if usage.revision else Path(usage.base).name


def write(usage: Usage, path: Path, certificate: dict[str, Any]) -> list[Path]:
    """Put what helps to use an adapter beside it; returns what was written.

    certificate: says of each loader whether it loads the file as it was trained. What was there
    for a loader that doesn't is removed. Raises MachineError where the disk refuses.
    """
    wanted: dict[str, str] = {}
    if not certificate["diffusers"]["reasons"]:
        wanted[ENDS[0]] = diffusers_snippet(usage)
    if not certificate["comfyui"]["reasons"]:
        for end, graph in comfyui_workflows(usage).items():
            wanted[end] = json.dumps(graph, indent=1, ensure_ascii=False) + "\n"
    for end in ENDS:
        target = path.with_name(f"{path.stem}{end}")
        if end in wanted:
            with files.replacing(target) as partial:
                partial.write_text(wanted[end], encoding="utf-8")
        else:
            target.unlink(missing_ok=True)
    return beside(path)


def beside(path: Path) -> list[Path]:
    """What of this there is beside an adapter."""
    targets = (path.with_name(f"{path.stem}{end}") for end in ENDS)
    return [target for target in targets if target.is_file()]


def _quoted(text: str) -> str:
    """As a Python string in double quotes, any language readable."""
    return json.dumps(text, ensure_ascii=False)
