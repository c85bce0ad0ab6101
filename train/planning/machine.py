"""GPUs as `kindling plan` sees them: the one at hand, or a card known by its size.

Owns the table of cards and what it was taken from. Asks CUDA and measures nothing else.
"""

import time
from dataclasses import dataclass

import torch

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A card's memory in bytes and its speeds."""

    name: str
    total: int
    """As torch reports it."""
    free: int
    """Of it when the plan was made; all of it for a card that isn't at hand."""
    matmul: float
    """Floating point operations a second of large bf16 matrix products."""
    bandwidth: float
    """Bytes a second of its own memory."""
    link: float
    """Bytes a second from RAM."""
    here: bool
    """At hand: memory and matmul are measured, else published or assumed."""


SHARE = 0.5
"""Assumed, not measured yet: what training reaches of a data sheet's matrix products. The low-rank
branches, attention and what isn't a matrix product are in it."""
SHARE_MEASURED = 0.6
"""Assumed, not measured yet: the same of the measured rate of large products."""
LINK_SHARE = 0.8
"""Assumed, not measured yet: what pinned copies reach of the PCIe generation's rate."""


def _card(name: str, gib: float, tflops: float, gigabytes: float, link: float) -> Gpu:
    size = int(gib * GIB)
    return Gpu(name, size, size, tflops * 1e12, gigabytes * 1e9, link * 1e9, here=False)


CARDS = {
    12: _card("RTX 4070", 11.6, 58.3, 504, 31.5),
    16: _card("RTX 4080", 15.5, 97.5, 717, 31.5),
    24: _card("RTX 4090", 23.6, 165.2, 1008, 31.5),
    32: _card("RTX 5090", 31.3, 209.5, 1792, 63.0),
    48: _card("L40S", 44.3, 362.0, 864, 31.5),
    80: _card("H100 SXM", 79.1, 989.4, 3350, 63.0),
    141: _card("H200", 139.7, 989.4, 4800, 63.0),
}
"""By the size that a card is sold as.

Products are dense, bf16, summed in fp32: twice the fp32 rate of GeForce cards (NVIDIA's Ada and RTX
Blackwell architecture papers), the data sheets' for the others (L40S 362.05, H100 and H200 989.4;
what they print large is with sparsity, twice that). Memory rates are the data sheets', the link is
one direction of PCIe 4.0 or 5.0 x16. Compared in November 2026 with third-party lists, not with
NVIDIA's own pages, which weren't at hand: waredb.com (4090), thefpsreview.com (4070, 4090),
hmc-tech.com (L40S, where it has 366; H100), itkb.uw.cz (H200); no list had the 4080's and the
5090's tensor rate apart from their fp32 one.

Memory is what torch reports, less than the name says (drivers, ECC): 23.64 to 23.68 GiB of an RTX
4090 (github.com/tloen/llama-int8/issues/7, ali-vilab/VGen#104), 31.36 of a 5090
(TrajectoryCrafter#20, Wan-Video/Wan2.1#465). The others' are assumed. An L4 or A10G, also sold as
24 GB, has about 22."""


def at_hand() -> Gpu | None:
    """This machine's GPU, its matrix products timed for about a second; None without one."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    rate = _timed_products(torch.device("cuda"))
    # memory and link have no quick honest measure here; both only matter for quantised or streamed
    near = min(CARDS.values(), key=lambda card: abs(card.total - total))
    name = torch.cuda.get_device_name()
    return Gpu(name, total, free, rate, near.bandwidth, near.link, here=True)


def _timed_products(device: torch.device, *, side: int = 4096, seconds: float = 0.5) -> float:
    """Operations a second of bf16 products of two square matrices, of random numbers.

    Equal ones would flatter: a chip that switches fewer bits keeps a higher clock.
    """
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(left, right)
    _wait(device)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        for _ in range(20):
            torch.mm(left, right)
        _wait(device)
        count += 20
    return 2 * side**3 * count / (time.perf_counter() - begin)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
