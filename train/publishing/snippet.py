"""Lines of Python that draw a picture with a published adapter."""

import json

from train.publishing.facts import Publication


def diffusers_snippet(publication: Publication, *, place: str, prompt: str, side: int) -> str:
    """A script for diffusers. place: repository of the hub, or folder, that has the file."""
    revision = f"revision={_quoted(publication.revision)}, " if publication.revision else ""
    pipeline = publication.certificate["diffusers"]["pipeline"]
    return (
        f"import torch\nfrom diffusers import {pipeline}\n\n"
        f"pipe = {pipeline}.from_pretrained({_quoted(publication.repository or publication.base)}, "
        f"{revision}torch_dtype=torch.bfloat16)\n"
        f"pipe.load_lora_weights({_quoted(place)}, "
        f"weight_name={_quoted(publication.exported[0].path.name)})\n"
        "pipe.enable_model_cpu_offload()\n"
        f"picture = pipe({_quoted(prompt)}, width={side}, height={side}).images[0]\n"
        f'picture.save("{publication.name}.png")\n'
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
