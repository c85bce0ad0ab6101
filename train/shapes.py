"""The shapes of the released bases: what can be known of them before anything is downloaded.

Owns these facts. A base that is at hand says its own shape, in its config.json.
"""

from dataclasses import dataclass
from typing import Any

HEAD_WIDTH = 128


@dataclass(frozen=True)
class Shape:
    """A transformer's shape; the rest is the same in all of FLUX.2."""

    double: int
    """Blocks with separate weights for picture and text."""
    single: int
    """Blocks with one set of weights for both."""
    heads: int
    """Attention heads of 128 channels; the width is their product."""
    text_width: int
    """Channels of a prompt's embedding."""
    guidance: bool
    """Whether the guidance scale is an input."""

    def config(self) -> dict[str, Any]:
        """Keyword arguments of diffusers' Flux2Transformer2DModel."""
        return {
            "in_channels": 128,
            "num_layers": self.double,
            "num_single_layers": self.single,
            "attention_head_dim": HEAD_WIDTH,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.text_width,
            "guidance_embeds": self.guidance,
        }


SHAPES = {
    "dev": Shape(double=8, single=48, heads=48, text_width=15360, guidance=True),
    "klein-4b": Shape(double=5, single=20, heads=24, text_width=7680, guidance=False),
    "klein-9b": Shape(double=8, single=24, heads=32, text_width=12288, guidance=False),
}
"""By the base's name in a config."""
