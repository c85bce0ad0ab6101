"""Builds the toy base from nothing: `python -m scripts.toy.build`.

Owns the order of the stages, their lengths and where things lie. Each stage leaves its result
in the work folder and is skipped when that is there; `scripts/toy/base` is complete, though
poor, after the first few hundred steps and is only ever replaced file by file.
"""

import argparse
import copy
import datetime
import json
import os
import platform
import random
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
)
from torch import nn
from transformers import AutoTokenizer, Mistral3ForConditionalGeneration

from scripts.toy.blockcode import write_encoder
from scripts.toy.dataset import write_data
from scripts.toy.denoiser import Feeder, Pool, new_transformer, pack, train_stage
from scripts.toy.draw import caption, draw, sample_scene
from scripts.toy.measure import BASE, HELD_OUT_SEED, measure, pipeline_painter
from scripts.toy.muon import Course
from scripts.toy.text import encode_captions, new_text_encoder, new_tokenizer
from scripts.toy.vae import (
    channel_weights,
    load_vae,
    new_vae,
    normalise,
    patch_latents,
    psnr,
    reconstruct,
    set_bn_statistics,
    to_pixels,
    to_unit,
    train_decoder,
    vae_pictures,
)

WORK = Path("build/toy")
SEED = 0
VAE_PICTURES = 12_000
DECODER = Course(name="decoder", steps=1000, batch=8, lr=3e-3, seed=0)
POLISH = Course(name="polish", steps=1500, batch=8, lr=3e-3, seed=1)
# (width, height) and how many scenes; every scene has two captions.
GEOMETRIES = (((64, 64), 14_000), ((80, 48), 4_000), ((48, 80), 4_000))
FLOW = Course(name="flow", steps=4200, batch=64, lr=3e-3, seed=11)
GUIDANCE = Course(name="guidance", steps=300, batch=64, lr=1e-3, seed=12)
STEPS, GUIDANCE_SCALE, PROMPTS = 24, 4.0, 200

CARD = """---
license: apache-2.0
library_name: diffusers
---
# Kindling's toy base

A FLUX.2 of the real classes (Flux2Pipeline, guidance embedding, Mistral3 text encoder), small
enough to live in a git repository and to draw on a laptop: coloured shapes on simple
backgrounds, 64 x 64 pixels (it knows 80 x 48 and 48 x 80 too, but draws poorly there). It exists
so that the whole of Kindling, from pictures to a working adapter, can be run and tested without
a GPU or a download.

    pipeline = Flux2Pipeline.from_pretrained("scripts/toy/base", dtype=torch.float32)
    pipeline("a red circle on a blue background", height=64, width=64, num_inference_steps=24,
             guidance_scale=4.0, max_sequence_length=32)

`max_sequence_length` is the tokenizer's `model_max_length`. The text encoder is random and was
never trained, the VAE's encoder is a block code that is written down; its decoder and the
transformer were trained by `python -m scripts.toy.build` on procedurally drawn pictures only.
How well it obeys is in `measured.json`.

Licence: Apache-2.0. No weights or data of any other model went into it.
"""


def replace(folder: Path, target: Path) -> None:
    """Move every file of `folder` onto `target`; a reader never sees half a file."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            goal = target / path.relative_to(folder)
            goal.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, goal)
    shutil.rmtree(folder)


def publish(model: nn.Module, name: str, base: Path) -> None:
    """Put a copy in bf16 into the base; `model` itself stays as it is."""
    fresh = base.with_name("base.new") / name
    rounded: Any = nn.Module.to(copy.deepcopy(model), "cpu", torch.bfloat16)
    rounded.save_pretrained(fresh)
    replace(fresh.parent, base)


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """As dev ships it."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def make_text(base: Path) -> None:
    if (base / "text_encoder" / "model.safetensors").exists():
        return
    tokenizer = new_tokenizer(seed=SEED)
    tokenizer.save_pretrained(base / "tokenizer")
    publish(new_text_encoder(tokenizer, seed=SEED), "text_encoder", base)


def make_vae(base: Path, work: Path, device: torch.device) -> None:
    """Write the encoder, round it as it will be stored, train the decoder, measure bn."""
    if (base / "vae" / "diffusion_pytorch_model.safetensors").exists():
        return
    started = time.monotonic()
    torch.manual_seed(SEED)
    pixels = vae_pictures(VAE_PICTURES, seed=1, size=64)
    vae = new_vae()
    write_encoder(vae, to_unit(pixels[:2000]))
    nn.Module.to(vae, torch.bfloat16).float()
    train_decoder(vae, pixels, DECODER, device=device)
    scenes = [sample_scene(random.Random(2_000_000 + i)) for i in range(2000)]
    pictures = to_pixels([draw(scene, 64, 64) for scene in scenes])
    set_bn_statistics(vae, patch_latents(vae, pictures, device=device))
    publish(vae, "vae", base)
    note(work, decoder_minutes=(time.monotonic() - started) / 60)


def polish_vae(base: Path, work: Path, device: torch.device) -> None:
    """Train the decoder on; the latents, and so the transformer, stay as they are."""
    if "polish_minutes" in notes(work):
        return
    started = time.monotonic()
    pixels = vae_pictures(VAE_PICTURES, seed=2, size=64)
    vae = load_vae(base, device)
    train_decoder(vae, pixels, POLISH, device=device)
    publish(vae, "vae", base)
    note(work, polish_minutes=(time.monotonic() - started) / 60)


def make_pools(base: Path, work: Path, device: torch.device) -> tuple[list[Pool], torch.Tensor]:
    """Normalised latents of every training scene and the table of caption embeddings."""
    path = work / "pools.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        return [Pool(**pool) for pool in state["pools"]], state["table"]
    vae = load_vae(base, device)
    index: dict[str, int] = {}
    pools, rng = [], random.Random(3)
    for (width, height), count in GEOMETRIES:
        scenes = [sample_scene(rng) for _ in range(count)]
        words = [
            [index.setdefault(caption(scene, rng), len(index)) for _ in range(2)]
            for scene in scenes
        ]
        parts = []
        for start in range(0, count, 1000):
            pictures = [draw(scene, width, height) for scene in scenes[start : start + 1000]]
            patches = patch_latents(vae, to_pixels(pictures), device=device)
            parts.append(pack(normalise(vae, patches)))
            print(f"latents {width}x{height} {start + len(pictures)}/{count}", flush=True)
        latents = torch.cat(parts)
        pools.append(Pool(latents, torch.tensor(words), rows=height // 16, columns=width // 16))
    tokenizer = AutoTokenizer.from_pretrained(base / "tokenizer")
    encoder = Mistral3ForConditionalGeneration.from_pretrained(base / "text_encoder")
    table = encode_captions(encoder, tokenizer, [*index, ""], device=device)
    print(f"captions {len(table)}", flush=True)
    torch.save({"pools": [vars(pool) for pool in pools], "table": table}, path)
    return pools, table


def make_transformer(base: Path, work: Path, device: torch.device) -> None:
    """Flow, then guidance; the base's transformer is refreshed at every snapshot."""
    if "transformer_minutes" in notes(work):
        return
    pools, table = make_pools(base, work, device)
    vae = load_vae(base, device)
    feeder = Feeder(pools, table, channel_weights=channel_weights(vae), device=device)
    torch.manual_seed(SEED)
    model = new_transformer()
    nn.Module.to(model, device)
    started = time.monotonic()

    def show(ema: Flux2Transformer2DModel) -> None:
        publish(ema, "transformer", base)

    if not (base / "transformer").exists():
        show(model)
    teacher = train_stage(
        model, feeder, FLOW, teacher=None, snapshot=work / "flow.pt", on_snapshot=show
    )
    train_stage(
        copy.deepcopy(teacher).requires_grad_(True), feeder, GUIDANCE, teacher=teacher,
        snapshot=work / "guidance.pt", on_snapshot=show,
    )  # fmt: skip
    note(work, transformer_minutes=(time.monotonic() - started) / 60)


def write_index(base: Path) -> None:
    """Everything a diffusers folder needs beside the weights."""
    new_scheduler().save_pretrained(base / "scheduler")
    index = {
        "_class_name": "Flux2Pipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (base / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (base / "README.md").write_text(CARD)


def notes(work: Path) -> dict[str, float]:
    """How long each finished stage took."""
    path = work / "minutes.json"
    return json.loads(path.read_text()) if path.exists() else {}


def note(work: Path, **minutes: float) -> None:
    rounded = {name: round(value, 1) for name, value in minutes.items()}
    (work / "minutes.json").write_text(json.dumps(notes(work) | rounded))


def make_measurements(base: Path, work: Path, device: torch.device) -> None:
    """VAE fidelity and obedience on held-out scenes, with all it takes to repeat them."""
    vae = load_vae(base, device)
    scenes = [sample_scene(random.Random(HELD_OUT_SEED + i)) for i in range(500)]
    pictures = to_pixels([draw(scene, 64, 64) for scene in scenes])
    shares = {
        f"guidance {scale}": measure(
            pipeline_painter(base, steps=STEPS, guidance=scale), count=PROMPTS
        )
        for scale in (1.0, GUIDANCE_SCALE)
    }
    found = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{device.type}, torch {torch.__version__}",
        "seed": SEED,
        "held_out_seed": HELD_OUT_SEED,
        "vae_psnr_db": round(psnr(reconstruct(vae, pictures, device=device), pictures), 2),
        "courses": [asdict(course) for course in (DECODER, FLOW, GUIDANCE, POLISH)],
        "training": notes(work),
        "prompts": PROMPTS,
        "inference_steps": STEPS,
        "obeyed": shares,
        "megabytes": round(sum(p.stat().st_size for p in base.rglob("*") if p.is_file()) / 1e6, 2),
    }
    (base / "measured.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-only", action="store_true", help="write the training pictures only")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--work", type=Path, default=WORK, help="snapshots, to resume from")
    options = parser.parse_args()
    write_data(Path(__file__).parent / "data")
    if options.data_only:
        return
    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.work.mkdir(parents=True, exist_ok=True)
    write_index(options.base)
    make_text(options.base)
    make_vae(options.base, options.work, device)
    make_transformer(options.base, options.work, device)
    polish_vae(options.base, options.work, device)
    make_measurements(options.base, options.work, device)


if __name__ == "__main__":
    main()
