"""A batch to its loss. Knows the model's arguments, not where batches come from.

Shape suffixes as in `latents`: B pictures of one geometry, D patch channels, h and w patches, L
text tokens, J width of the text embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from train import flow, latents


@dataclass(frozen=True)
class Batch:
    """Pictures of one geometry, with references of one geometry each, ready for the model."""

    latents_BDhw: Tensor
    """Normalised, fp32."""
    noise_BDhw: Tensor
    """Standard normal, fp32; never normalised."""
    sigma_B: Tensor
    """Noise levels in (0, 1], fp32."""
    text_BLJ: Tensor
    """Prompt embeddings in the model's type, pads included."""
    references: tuple[Tensor, ...]
    """Reference i of every picture: (B, D, h_i, w_i), normalised, fp32."""
    names: tuple[str, ...]
    """Files, for messages."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            latents_BDhw=move(self.latents_BDhw),
            noise_BDhw=move(self.noise_BDhw),
            sigma_B=move(self.sigma_B),
            text_BLJ=move(self.text_BLJ),
            references=tuple(move(reference) for reference in self.references),
            names=self.names,
        )


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
    noised = flow.noised(clean, batch.noise_BDhw, sigma=batch.sigma_B)
    tokens = [latents.pack(part).to(dtype) for part in (noised, *batch.references)]
    sizes = [(r.shape[2], r.shape[3]) for r in batch.references]
    image_ids = torch.cat([latents.image_ids(h, w), latents.reference_ids(sizes)])
    prediction = transformer(
        hidden_states=torch.cat(tokens, dim=1),
        encoder_hidden_states=batch.text_BLJ.to(dtype),
        timestep=flow.model_time(batch.sigma_B, dtype=dtype),
        guidance=None if guidance is None else torch.full((B,), guidance, device=clean.device),
        img_ids=image_ids.to(clean.device),
        txt_ids=latents.text_ids(batch.text_BLJ.shape[1]).to(clean.device),
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
    """Mean squared error of the velocity by picture, (B,), fp32."""
    prediction = predict(transformer, batch, dtype=dtype, guidance=guidance)
    target = flow.velocity(batch.latents_BDhw, batch.noise_BDhw)
    return (prediction - target).square().mean(dim=(1, 2, 3))
