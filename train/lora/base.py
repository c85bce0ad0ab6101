"""The frozen weights under an adapter, wherever they are kept."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train import zero3


def weights(transformer: nn.Module, modules: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Of these modules, before an adapter is on them or after it is off again; one at a time.

    A streamed block's come from RAM, its own place may hold another block's. A sharded one is
    gathered, so all processes must ask together.
    """
    state = transformer.state_dict()  # no copy, and what streaming corrects
    for module in modules:
        yield module, whole(state[f"{module}.weight"])


def whole(weight: Tensor) -> Tensor:
    """A weight itself; a sharded one is gathered, so all processes must ask together."""
    return weight.full_tensor() if isinstance(weight, DTensor) else zero3.whole(weight)
