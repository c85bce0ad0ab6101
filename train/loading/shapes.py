"""The shapes of the released bases: what can be known of them before anything is downloaded.

Owns these facts, from the published configs; a test builds the models and counts. A base that is at
hand says its own shape, in its config.json.
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

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * HEAD_WIDTH

    @property
    def parameters(self) -> int:
        """Of the whole transformer; with D the width, 26 D² a double block and 13 D² a single one,
        their head norms, embeddings and modulations."""
        width = self.width
        blocks = (26 * self.double + 13 * self.single) * width**2
        norms = (4 * self.double + 2 * self.single) * HEAD_WIDTH
        times = (256 * width + width**2) * (2 if self.guidance else 1)
        modulation = (6 + 6 + 3 + 2) * width**2  # picture, text, single blocks, output
        return blocks + norms + times + modulation + (128 + self.text_width + 128) * width

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


@dataclass(frozen=True)
class TextEncoder:
    """The decoder of a text encoder, and what its files hold beside it."""

    layers: int
    used: int
    """Layers that a prompt passes through; the others are never loaded."""
    width: int
    inner: int
    heads: int
    groups: int
    """Key-value heads, of as many channels as the others."""
    head_width: int
    vocabulary: int
    head_norms: bool
    """Whether queries and keys are normed (Qwen3)."""
    beside: int = 0
    """Parameters that are never loaded: vision tower, projector, output head."""

    @property
    def linears(self) -> int:
        """Weights of one layer's matrices, which is what can be quantised."""
        attention = 2 * (self.heads + self.groups) * self.head_width
        return self.width * (attention + 3 * self.inner)

    def parameters(self, layers: int) -> int:
        """Of the embedding, so many layers, and the last norm."""
        norms = 2 * self.width + (2 * self.head_width if self.head_norms else 0)
        return self.vocabulary * self.width + layers * (self.linears + norms) + self.width

    @property
    def stored(self) -> int:
        """Parameters in the base's files."""
        return self.parameters(self.layers) + self.beside


def _qwen3(*, width: int, inner: int, beside: int) -> TextEncoder:
    return TextEncoder(
        layers=36,
        used=27,
        width=width,
        inner=inner,
        heads=32,
        groups=8,
        head_width=128,
        vocabulary=151936,
        head_norms=True,
        beside=beside,
    )


TEXT_ENCODERS = {
    "dev": TextEncoder(
        layers=40,
        used=30,
        width=5120,
        inner=32768,
        heads=32,
        groups=8,
        head_width=128,
        vocabulary=131072,
        head_norms=False,
        beside=131072 * 5120 + 438_958_080,
    ),
    "klein-4b": _qwen3(width=2560, inner=9728, beside=0),
    "klein-9b": _qwen3(width=4096, inner=12288, beside=151936 * 4096),
}
"""Published configs of Mistral-Small-3.2-24B, Qwen3-4B (whose head is its embedding) and Qwen3-8B.
Beside: their output heads, and Mistral's vision tower with its projector."""

VAE_PARAMETERS = 84_046_115
"""The same VAE in all of FLUX.2."""
VAE_BYTES = {"dev": 4, "klein-4b": 2, "klein-9b": 2}
"""Bytes a parameter of its file: 168 MB beside klein by the hub's list; dev's is assumed fp32."""
