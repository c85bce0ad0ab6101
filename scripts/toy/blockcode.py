"""A VAE encoder that is written down, not trained: principal components of 8x8 blocks.

AutoencoderKLFlux2's encoder can compute a linear code exactly. Each stride-2 convolution
gathers 2x2 neighbours and keeps their leading principal components; the residual branches are
zero. The last GroupNorm is held still by a constant pair of channels +K, -K in each group, and
SiLU is undone by feeding it every number twice: silu(x) - silu(-x) = x.

So the code is faithful to any picture, also to what the toy base has never seen, and only the
decoder needs training.
"""

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor, nn

GROUPS = 8
HOLD = 40.0
SURE = -12.0


def gather(x_BCHW: Tensor) -> Tensor:
    """2x2 neighbours as channels: (B, C, H, W) to (B, 4C, H/2, W/2), order (c, pi, pj)."""
    return nn.functional.pixel_unshuffle(x_BCHW, 2)


def components(x_BCHW: Tensor, count: int) -> Tensor:
    """(count, C) leading principal directions over batch and positions, by variance."""
    rows = x_BCHW.movedim(1, -1).flatten(0, -2)
    covariance = torch.cov(rows.T.double())
    return torch.linalg.eigh(covariance).eigenvectors.flip(-1)[:, :count].T.float()


def project(x_BCHW: Tensor, basis: Tensor) -> Tensor:
    return torch.einsum("kc,bchw->bkhw", basis, x_BCHW)


def set_downsampler(conv: nn.Conv2d, basis: Tensor) -> None:
    """Make a stride-2 convolution compute basis @ gather(x); its third row and column stay 0."""
    conv.weight.zero_()
    assert conv.bias is not None
    conv.bias.zero_()
    count, inputs = basis.shape[0], basis.shape[1] // 4
    conv.weight[:count, :inputs, :2, :2] = basis.reshape(count, inputs, 2, 2)


def set_identity(conv: nn.Conv2d, count: int) -> None:
    """Pass the first `count` channels through at the kernel's centre, nothing else."""
    conv.weight.zero_()
    assert conv.bias is not None
    conv.bias.zero_()
    centre = conv.kernel_size[0] // 2
    for i in range(count):
        conv.weight[i, i, centre, centre] = 1.0


@torch.no_grad()
def write_encoder(vae: AutoencoderKLFlux2, x_BCHW: Tensor) -> None:
    """Write the block code of these pictures, (B, 3, H, W) in [-1, 1], into `vae.encoder`."""
    encoder: Any = vae.encoder
    code = vae.config["latent_channels"]
    for name, weight in encoder.named_parameters():
        if "conv2." in name:
            weight.zero_()
    set_identity(encoder.conv_in, 3)
    x = x_BCHW
    for block in encoder.down_blocks[:3]:
        resnet = block.resnets[0]
        if resnet.conv_shortcut is not None:
            set_identity(resnet.conv_shortcut, x.shape[1])
        conv = block.downsamplers[0].conv
        spread = gather(x)
        basis = components(spread, min(conv.out_channels, spread.shape[1]))
        set_downsampler(conv, basis)
        x = project(spread, basis)
    hold_still(encoder, x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3)), code)
    assert vae.quant_conv is not None
    set_identity(vae.quant_conv, 2 * code)


def hold_still(encoder: Any, mean: Tensor, variance: Tensor, code: int) -> None:
    """The last shortcut, norm and convolution: each number centred, doubled, held and undone.

    Numbers pass the norm in units of their own deviation, so that none drowns the others in
    its group, and leave it in units of that deviation's root: unequal variances and means for
    `vae.bn` to even out, as in the real model.
    """
    twin, last = encoder.down_blocks[3].resnets[0].conv_shortcut, encoder.conv_out
    width = twin.out_channels
    per_group = width // GROUPS
    pairs = per_group // 2 - 1
    assert pairs * GROUPS >= code, "the last level is too narrow for this code"
    for conv in (twin, last):
        conv.weight.zero_()
        conv.bias.zero_()
    deviation = variance.clamp(min=1e-6).sqrt()
    # GroupNorm divides by the group's root mean square: HOLD with two held channels of per_group.
    norm = HOLD * (2 / per_group) ** 0.5
    for i in range(code):
        group, pair = i % GROUPS, i // GROUPS
        up = group * per_group + 2 * pair
        for channel, sign in ((up, 1.0), (up + 1, -1.0)):
            twin.weight[channel, i, 0, 0] = sign / deviation[i]
            twin.bias[channel] = -sign * mean[i] / deviation[i]
            last.weight[i, channel, 1, 1] = sign * norm * deviation[i].sqrt()
        last.bias[i] = mean[i] / deviation[i].sqrt()
    for group in range(GROUPS):
        twin.bias[(group + 1) * per_group - 2] = HOLD
        twin.bias[(group + 1) * per_group - 1] = -HOLD
    last.bias[code:] = SURE
