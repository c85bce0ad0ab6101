"""Lines of progress for a long build: one every few seconds, with the rate and what is left."""

import time

import torch


class Progress:
    """Averages the losses it is told and prints them; reads a tensor only when it prints."""

    def __init__(self, name: str, *, every_s: float = 10.0) -> None:
        self.name = name
        self.every_s = every_s
        self.started = self.printed = time.monotonic()
        self.sum: torch.Tensor | float = 0.0
        self.count = 0
        self.first: int | None = None

    def tell(self, step: int, *, total: int, loss: torch.Tensor) -> None:
        if self.first is None:
            self.first = step - 1
        self.sum = self.sum + loss
        self.count += 1
        now = time.monotonic()
        if now - self.printed < self.every_s and step < total:
            return
        pace = (now - self.started) / (step - self.first)
        left = pace * (total - step)
        mean = float(self.sum) / self.count
        speed = f"{pace:.3f} s/step  {left / 60:.1f} min left"
        print(f"{self.name} {step}/{total}  loss {mean:.4f}  {speed}", flush=True)
        self.printed, self.sum, self.count = now, 0.0, 0
