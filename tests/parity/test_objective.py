"""The training loss against diffusers' formula, and previews against the whole pipeline."""

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from PIL import Image

from tests import runs, tiny
from train import latents, objective, sample
from train.batch import Batch
from train.config import BaseConfig
from train.encoding import encode, encode_text, texts
from train.encoding.cache import Cache, FileDigests
from train.loading import base


def make_batch(*, references: int = 0, size: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Batch(
        latents_BDhw=random(size, 16, 3, 2),
        noise_BDhw=random(size, 16, 3, 2),
        weight_Bhw=torch.ones(size, 3, 2),
        sigma_B=torch.rand(size, generator=generator),
        text_BLJ=random(size, 5, 3 * tiny.TEXT_WIDTH),
        references=tuple(random(size, 16, 2, 2 + i) for i in range(references)),
        names=tuple(f"{i}.png" for i in range(size)),
    )


@pytest.mark.parametrize("guidance", [None, 1.0, 4.0])
def test_loss_is_diffusers_formula(guidance):
    """As in train_dreambooth_lora_flux2.py, written with the pipeline's own functions."""
    transformer = tiny.transformer(guidance=guidance is not None)
    batch = make_batch()
    sigmas = batch.sigma_B.view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * batch.latents_BDhw + sigmas * batch.noise_BDhw
    prediction = transformer(
        hidden_states=Flux2Pipeline._pack_latents(noisy),
        timestep=batch.sigma_B * 1000 / 1000,
        guidance=None if guidance is None else torch.tensor([guidance, guidance]),
        encoder_hidden_states=batch.text_BLJ,
        txt_ids=Flux2Pipeline._prepare_text_ids(batch.text_BLJ),
        img_ids=Flux2Pipeline._prepare_latent_ids(batch.latents_BDhw),
        return_dict=False,
    )[0]
    ids = Flux2Pipeline._prepare_latent_ids(batch.latents_BDhw)
    prediction: Any = Flux2Pipeline._unpack_latents_with_ids(prediction, ids)
    target = batch.noise_BDhw - batch.latents_BDhw
    expected = torch.mean((prediction.float() - target.float()) ** 2)
    ours = objective.losses(transformer, batch, dtype=torch.float32, guidance=guidance)
    torch.testing.assert_close(ours.mean(), expected, rtol=1e-6, atol=0)


def test_weights_count_by_patch():
    """A patch of twice the weight counts twice; a picture's loss is the mean over its patches."""
    transformer = tiny.transformer(guidance=True)
    batch = make_batch()
    plain = objective.predict(transformer, batch, dtype=torch.float32, guidance=1.0)
    error = (plain - (batch.noise_BDhw - batch.latents_BDhw)).square().mean(dim=1)
    weight = torch.rand(2, 3, 2)
    batch = dataclasses.replace(batch, weight_Bhw=weight)
    ours = objective.losses(transformer, batch, dtype=torch.float32, guidance=1.0)
    torch.testing.assert_close(ours, (error * weight).mean(dim=(1, 2)))


def test_references_are_seen_and_cut_off():
    """They change the prediction, in the pipeline's order and positions, and aren't predicted."""
    transformer = tiny.transformer(guidance=True)
    batch = make_batch(references=2)
    ours = objective.predict(transformer, batch, dtype=torch.float32, guidance=1.0)
    assert ours.shape == batch.latents_BDhw.shape

    captured = {}
    transformer.register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(kwargs), with_kwargs=True
    )
    objective.predict(transformer, batch, dtype=torch.float32, guidance=1.0)
    first = [reference[:1] for reference in batch.references]
    expected_ids = torch.cat(
        [
            Flux2Pipeline._prepare_latent_ids(batch.latents_BDhw)[0],
            Flux2Pipeline._prepare_image_ids(first)[0],
        ]
    )
    assert torch.equal(captured["img_ids"], expected_ids)
    tail = torch.cat([latents.pack(reference) for reference in batch.references], dim=1)
    assert torch.equal(captured["hidden_states"][:, 6:], tail)

    without = dataclasses.replace(batch, references=())
    alone = objective.predict(transformer, without, dtype=torch.float32, guidance=1.0)
    assert not torch.allclose(ours, alone)


@pytest.mark.parametrize("family", ["dev", "klein"])
@pytest.mark.parametrize("sizes", [(), ((64, 64), (200, 90))], ids=["plain", "edit"])
def test_prompts_and_previews_are_the_pipelines(family, sizes, request, tmp_path):
    """From prompt to pixels: cached embeddings, then `draw`, against one call of the pipeline."""
    paths = [tmp_path / f"{number}.png" for number in range(len(sizes))]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        runs.draw_picture(path, size=size, seed=number)
    folder = request.getfixturevalue(f"{family}_folder")
    found = base.resolve(BaseConfig(model=str(folder), dtype="fp32"))
    cache = Cache(tmp_path)
    keys = encode.Keys.of(found, digests=FileDigests(tmp_path / "digests.json"))
    prompt = "a red circle"
    cpu = torch.device("cpu")
    assert encode_text.encode_prompts(found, [prompt, ""], keys=keys, cache=cache, device=cpu) == 2
    text, empty = (texts.get(cache, keys.prompt(p)) for p in (prompt, ""))

    pipeline_class = Flux2Pipeline if family == "dev" else Flux2KleinPipeline
    pipeline: Any = pipeline_class.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    limit = pipeline.tokenizer.model_max_length
    expected_text, _ = pipeline.encode_prompt(prompt=prompt, max_sequence_length=limit)
    assert torch.equal(text, expected_text[0])
    mask = pipeline.tokenizer("x", padding="max_length", max_length=limit).attention_mask
    padded_left = mask[0] == 0
    assert padded_left == (found.family.padding_side == "left")

    settings = {"num_inference_steps": 3, "guidance_scale": 3.0}
    expected = pipeline(
        image=[Image.open(path) for path in paths] or None,
        prompt=prompt,
        height=64,
        width=80,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=limit,
        **settings,
    ).images[0]
    drawn = sample.draw(
        found,
        found.load_transformer(cpu),
        [sample.Request(text, seed=5, width=80, height=64, references=tuple(paths))],
        empty_text=empty,
        steps=3,
        guidance=3.0,
    )[0]
    assert drawn.size == (80, 64)
    assert drawn.tobytes() == expected.tobytes()
