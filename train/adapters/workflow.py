"""A ComfyUI workflow around an adapter, in the form that its window opens by drag and drop.

Owns the graph: which of ComfyUI's own nodes, their sockets and the order of their widgets' values,
as its source has them (a test holds the graph against a record of that). The files that it names
are those of ComfyUI's own templates for FLUX.2. What is drawn in it is `usage`'s.
"""

import uuid
from dataclasses import dataclass
from typing import Any

NODES: dict[str, tuple[dict[str, str], tuple[str, ...], int]] = {
    "UNETLoader": ({}, ("MODEL",), 2),
    "LoraLoaderModelOnly": ({"model": "MODEL"}, ("MODEL",), 2),
    "CLIPLoader": ({}, ("CLIP",), 3),
    "CLIPTextEncode": ({"clip": "CLIP"}, ("CONDITIONING",), 1),
    "FluxGuidance": ({"conditioning": "CONDITIONING"}, ("CONDITIONING",), 1),
    "BasicGuider": ({"model": "MODEL", "conditioning": "CONDITIONING"}, ("GUIDER",), 0),
    "CFGGuider": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING"},
        ("GUIDER",),
        1,
    ),
    "RandomNoise": ({}, ("NOISE",), 2),
    "KSamplerSelect": ({}, ("SAMPLER",), 1),
    "Flux2Scheduler": ({}, ("SIGMAS",), 3),
    "EmptyFlux2LatentImage": ({}, ("LATENT",), 3),
    "SamplerCustomAdvanced": (
        {
            "noise": "NOISE",
            "guider": "GUIDER",
            "sampler": "SAMPLER",
            "sigmas": "SIGMAS",
            "latent_image": "LATENT",
        },
        ("LATENT", "LATENT"),
        0,
    ),
    "VAELoader": ({}, ("VAE",), 1),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",), 0),
    "SaveImage": ({"images": "IMAGE"}, (), 1),
    "MarkdownNote": ({}, (), 1),
}
"""Node -> its sockets (name, type), its outputs' types, and how many values its widgets have."""

OUTPUT_NAMES = {"SamplerCustomAdvanced": ("output", "denoised_output")}
"""Where they aren't the types."""

COLUMN, ROW = 420, 190
"""Pixels between nodes."""

HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class Model:
    """The files of a base that ComfyUI loads; each from `directory` of its models folder."""

    transformer: str
    text_encoder: str

    def links(self) -> dict[str, tuple[str, str]]:
        """File -> its folder in ComfyUI/models, and where it is to be had."""
        return {
            self.transformer.rsplit("/", 1)[1]: ("diffusion_models", HUB + self.transformer),
            self.text_encoder.rsplit("/", 1)[1]: ("text_encoders", HUB + self.text_encoder),
            VAE.rsplit("/", 1)[1]: ("vae", HUB + VAE),
        }


_FILES = "resolve/main/split_files"
VAE = f"Comfy-Org/flux2-dev/{_FILES}/vae/flux2-vae.safetensors"
_QWEN_4B = f"Comfy-Org/flux2-klein/{_FILES}/text_encoders/qwen_3_4b.safetensors"
_QWEN_8B = f"Comfy-Org/flux2-klein-9B/{_FILES}/text_encoders/qwen_3_8b_fp8mixed.safetensors"

MODELS = {
    ("dev", False): Model(
        f"Comfy-Org/flux2-dev/{_FILES}/diffusion_models/flux2_dev_fp8mixed.safetensors",
        f"Comfy-Org/flux2-dev/{_FILES}/text_encoders/mistral_3_small_flux2_bf16.safetensors",
    ),
    ("klein-4b", False): Model(
        f"Comfy-Org/flux2-klein/{_FILES}/diffusion_models/flux-2-klein-base-4b.safetensors",
        _QWEN_4B,
    ),
    ("klein-4b", True): Model(
        f"Comfy-Org/flux2-klein/{_FILES}/diffusion_models/flux-2-klein-4b.safetensors", _QWEN_4B
    ),
    ("klein-9b", False): Model(
        "black-forest-labs/FLUX.2-klein-base-9b-fp8/resolve/main/"
        "flux-2-klein-base-9b-fp8.safetensors",
        _QWEN_8B,
    ),
    ("klein-9b", True): Model(
        "black-forest-labs/FLUX.2-klein-9b-fp8/resolve/main/flux-2-klein-9b-fp8.safetensors",
        _QWEN_8B,
    ),
}
"""Released base, whether its step-distilled checkpoint -> files."""


@dataclass(frozen=True)
class Drawing:
    """What a workflow is to draw."""

    base: str
    """A released one: dev, klein-4b or klein-9b."""
    distilled: bool
    adapter: str
    """Name of its file, in ComfyUI/models/loras."""
    prompt: str
    width: int
    height: int
    steps: int
    guidance: float
    seed: int = 0
    trained_on: str | None = None
    """Where that was other weights of this shape, which may be the ones to load here."""


class _Graph:
    """Nodes and links, numbered as they come."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []

    def add(
        self,
        kind: str,
        at: tuple[float, float],
        *values: Any,
        title: str | None = None,
        size: tuple[int, int] = (360, 130),
        **sources: int,
    ) -> int:
        """A node and the links into it; its number. at: column and row. sources: socket -> the node
        whose first output it takes."""
        sockets, outputs, widgets = NODES[kind]
        assert (len(values), sources.keys()) == (widgets, sockets.keys()), kind
        number = len(self.nodes) + 1
        inputs = []
        for slot, (name, value_type) in enumerate(sockets.items()):
            link, source = len(self.links) + 1, sources[name]
            self.links.append([link, source, 0, number, slot, value_type])
            self.nodes[source - 1]["outputs"][0]["links"].append(link)
            inputs.append({"name": name, "type": value_type, "link": link})
        names = OUTPUT_NAMES.get(kind, outputs)
        self.nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [round(at[0] * COLUMN), round(at[1] * ROW)],
                "size": list(size),
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": inputs,
                "outputs": [
                    {"name": name, "type": value_type, "links": []}
                    for name, value_type in zip(names, outputs, strict=True)
                ],
                "properties": {"Node name for S&R": kind},
                "widgets_values": list(values),
            }
            | ({"title": title} if title else {})
        )
        return number


def build(drawing: Drawing) -> dict[str, Any]:
    """The workflow, JSON-able; the same for the same drawing."""
    model = MODELS[drawing.base, drawing.distilled]
    links = model.links()
    transformer, text_encoder, vae_file = links
    size = drawing.width, drawing.height
    graph = _Graph()
    unet = graph.add("UNETLoader", (0, 0), transformer, "default")
    clip = graph.add("CLIPLoader", (0, 1), text_encoder, "flux2", "default")
    vae = graph.add("VAELoader", (0, 2), vae_file)
    lora = graph.add("LoraLoaderModelOnly", (1, 0), drawing.adapter, 1.0, model=unet)
    text = graph.add("CLIPTextEncode", (1, 1), drawing.prompt, title="Prompt", clip=clip)
    if drawing.base == "dev":
        told = graph.add("FluxGuidance", (1, 2), drawing.guidance, conditioning=text)
        guider = graph.add("BasicGuider", (2, 0), model=lora, conditioning=told)
    else:
        empty = graph.add("CLIPTextEncode", (1, 2), "", title="Negative prompt", clip=clip)
        guider = graph.add(
            "CFGGuider",
            (2, 0),
            drawing.guidance,
            model=lora,
            positive=text,
            negative=empty,
        )
    noise = graph.add("RandomNoise", (2, 1), drawing.seed, "fixed")
    sampler = graph.add("KSamplerSelect", (2, 2), "euler")
    sigmas = graph.add("Flux2Scheduler", (2, 3), drawing.steps, *size)
    latent = graph.add("EmptyFlux2LatentImage", (1, 3), *size, 1)
    sampled = graph.add(
        "SamplerCustomAdvanced",
        (3, 0),
        noise=noise,
        guider=guider,
        sampler=sampler,
        sigmas=sigmas,
        latent_image=latent,
    )
    decoded = graph.add("VAEDecode", (3, 1), samples=sampled, vae=vae)
    prefix = drawing.adapter.removesuffix(".safetensors")
    graph.add("SaveImage", (4, 0), prefix, size=(480, 520), images=decoded)
    graph.add("MarkdownNote", (0, 3), _note(drawing, links), title="Files", size=(360, 300))
    for node, file in ((unet, transformer), (clip, text_encoder), (vae, vae_file)):
        folder, url = links[file]
        known = {"name": file, "url": url, "directory": folder}
        graph.nodes[node - 1]["properties"]["models"] = [known]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, repr(drawing))),
        "revision": 0,
        "last_node_id": len(graph.nodes),
        "last_link_id": len(graph.links),
        "nodes": graph.nodes,
        "links": graph.links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _note(drawing: Drawing, links: dict[str, tuple[str, str]]) -> str:
    rows = [f"- `models/loras/{drawing.adapter}`: the adapter, at strength 1"]
    rows += [f"- `models/{folder}/` [{file}]({url})" for file, (folder, url) in links.items()]
    if drawing.trained_on:
        rows += ["", f"The adapter was trained on {drawing.trained_on}; choose it if you have it."]
    return "\n".join(["In ComfyUI's folder:", "", *rows])
