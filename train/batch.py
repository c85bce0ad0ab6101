"""What the model is trained on in one pass: the type between `data` and `objective`.

Shape suffixes: B pictures of one geometry, D patch channels, h and w patches, L text tokens, J
width of the text embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Pictures of one geometry, with references of one geometry each, ready for the model."""

    latents_BDhw: Tensor
    """Normalised, fp32."""
    noise_BDhw: Tensor
    """Standard normal, fp32; never normalised."""
    weight_Bhw: Tensor
    """What the loss of each patch counts for, fp32; 1 where nothing says otherwise."""
    sigma_B: Tensor
    """Noise levels in (0, 1], fp32."""
    text_BLJ: Tensor
    """Prompt embeddings in the model's type, pads included."""
    references: tuple[Tensor, ...]
    """Reference i of every picture: (B, D, h_i, w_i), normalised, fp32."""
    names: tuple[str, ...]
    """Files, for messages."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device; a pinned one goes there while the CPU works on."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, from which a GPU copies by itself."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            latents_BDhw=change(self.latents_BDhw),
            noise_BDhw=change(self.noise_BDhw),
            weight_Bhw=change(self.weight_Bhw),
            sigma_B=change(self.sigma_B),
            text_BLJ=change(self.text_BLJ),
            references=tuple(change(reference) for reference in self.references),
            names=self.names,
        )
