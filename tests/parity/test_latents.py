"""Patches, packing, positions and normalisation against Flux2Pipeline's own."""

from typing import Any

import pytest
import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from tests import tiny
from train import latents
from train.encoding import encode

ABSENT: Any = None


def test_patchify_is_the_pipelines():
    raw = torch.randn(2, 4, 6, 10)
    assert torch.equal(latents.patchify(raw), Flux2Pipeline._patchify_latents(raw))


def test_pack_and_unpack_are_the_pipelines():
    patches = torch.randn(2, 16, 3, 5)
    packed = latents.pack(patches)
    assert torch.equal(packed, Flux2Pipeline._pack_latents(patches))
    assert torch.equal(latents.unpack(packed, height=3, width=5), patches)


def test_positions_are_the_pipelines():
    image = torch.zeros(1, 16, 3, 5)
    assert torch.equal(latents.image_ids(3, 5), Flux2Pipeline._prepare_latent_ids(image)[0])
    prompt = torch.zeros(1, 7, 24)
    assert torch.equal(latents.text_ids(7), Flux2Pipeline._prepare_text_ids(prompt)[0])


@pytest.mark.parametrize("sizes", [[(2, 3)], [(2, 3), (4, 1), (2, 2)]])
def test_reference_positions_are_the_pipelines(sizes):
    images = [torch.zeros(1, 16, h, w) for h, w in sizes]
    ours = latents.reference_ids(sizes)
    assert torch.equal(ours, Flux2Pipeline._prepare_image_ids(images)[0])
    assert ours[0, 0] == 10


def test_no_references_have_no_positions():
    assert latents.reference_ids([]).shape == (0, 4)


def test_encoded_pixels_are_the_pipelines():
    """The pipeline encodes reference pictures just as a target must be encoded."""
    vae = tiny.vae()
    picture = Image.effect_noise((64, 96), 90).convert("RGB")
    pipeline = Flux2Pipeline(
        scheduler=ABSENT,
        vae=vae,
        text_encoder=ABSENT,
        tokenizer=ABSENT,
        transformer=ABSENT,
    )
    theirs = Flux2ImageProcessor().preprocess(picture, height=96, width=64)
    with torch.no_grad():
        expected = pipeline._encode_vae_image(theirs, generator=ABSENT)
        ours = encode.encode_pixels(vae, encode._pixels(picture))
    assert torch.equal(encode._pixels(picture), theirs)
    assert ours.shape == (1, 16, 6, 4)
    # one square root and one division, in another order
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_normalisation_uses_the_running_statistics():
    """A VAE with other statistics must give other latents: 0 and 1 would hide a mistake."""
    raw = torch.randn(1, 16, 2, 2)
    mean, var = torch.full((16,), 2.0), torch.full((16,), 4.0)
    normal = latents.normalize(raw, mean_D=mean, var_D=var, eps=0.0)
    assert torch.equal(normal, (raw - 2) / 2)
