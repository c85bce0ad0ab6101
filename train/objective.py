"""A batch to its loss. Knows the model's arguments, not where batches come from.

Shape suffixes as in `batch`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from train import flow, latents
from train.batch import Batch


def predict(
    transformer: Callable[..., tuple[Tensor, ...]],
    batch: Batch,
    *,
    dtype: torch.dtype,
    guidance: float | None,
) -> Tensor:
    """The model's velocity for the noised pictures, (B, D, h, w), fp32.

    References follow the noised tokens, and the prediction is cut to the picture's own.
    guidance: what the guidance embedding is told; None for a model that has none.
    """
    clean = batch.latents_BDhw
    B, _, h, w = clean.shape
    device = clean.device
    noised = flow.noised(clean, batch.noise_BDhw, sigma=batch.sigma_B)
    tokens = [latents.pack(part).to(dtype) for part in (noised, *batch.references)]
    sizes = [(r.shape[2], r.shape[3]) for r in batch.references]
    positions = [
        latents.image_ids(h, w, device=device),
        latents.reference_ids(sizes, device=device),
    ]
    prediction = transformer(
        hidden_states=torch.cat(tokens, dim=1),
        encoder_hidden_states=batch.text_BLJ.to(dtype),
        timestep=flow.model_time(batch.sigma_B, dtype=dtype),
        guidance=None if guidance is None else torch.full((B,), guidance, device=device),
        img_ids=torch.cat(positions),
        txt_ids=latents.text_ids(batch.text_BLJ.shape[1], device=device),
        return_dict=False,
    )[0]
    return latents.unpack(prediction[:, : h * w].float(), height=h, width=w)


def losses(
    transformer: Callable[..., tuple[Tensor, ...]],
    batch: Batch,
    *,
    dtype: torch.dtype,
    guidance: float | None,
) -> Tensor:
    """Mean weighted squared error of the velocity by picture, (B,), fp32."""
    prediction = predict(transformer, batch, dtype=dtype, guidance=guidance)
    target = flow.velocity(batch.latents_BDhw, batch.noise_BDhw)
    weighted = (prediction - target).square() * batch.weight_Bhw[:, None]
    return weighted.mean(dim=(1, 2, 3))
