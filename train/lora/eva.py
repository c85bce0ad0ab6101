"""EVA's start: each down matrix is the main directions of what its Linear is given in training.

peft's incremental PCA finds them. Its own loop around it isn't used: that lists every input number
in Python to find equal ones (25 million a Linear on dev at 1024), has no end but convergence, and
shares ranks out among the modules, which files for ComfyUI would have to hold one by one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn

from train.errors import ConfigError
from train.lora import layers

PICTURES = 16
"""From the first showings on; at 1024 x 1024 these are 74,000 vectors a Linear."""

SEED = 42
"""Of the randomised SVD, as in peft."""


@contextmanager
def listening(transformer: nn.Module, targets: list[str], *, rank: int) -> Iterator[None]:
    """Forward passes inside are listened to, and at the end the fresh adapter starts from them.

    EVA (Paischer et al. 2024). Down's rows become the first principal components of the inputs,
    orthonormal; up stays zero. Raises ConfigError for more ranks than a batch has vectors.
    """
    found: dict[str, IncrementalPCA] = {}
    handles = [
        transformer.get_submodule(name).register_forward_pre_hook(_listener(name, found, rank))
        for name in targets
    ]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for name, down in layers.parts(transformer)["lora_A"].items():
            down.copy_(found[name].components_)


def _listener(name: str, found: dict[str, IncrementalPCA], rank: int) -> Any:
    def listen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        vectors = inputs[0].flatten(0, -2).float()
        if name not in found:
            most = min(vectors.shape)
            if rank > most:
                raise ConfigError(
                    f"lora.rank: {rank} is more than the {most} directions that eva can find in "
                    f"a batch of what {name} is given. Lower it, or remove lora.init."
                )
            fast = 2 * rank <= most  # as many as the randomised SVD looks for
            found[name] = IncrementalPCA(n_components=rank, lowrank=fast, lowrank_seed=SEED)
        found[name].partial_fit(vectors)

    return listen
