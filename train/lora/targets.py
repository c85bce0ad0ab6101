"""Which Linears of a transformer an adapter goes on: what `lora.targets` means."""

import re

from torch import nn

from train.errors import ConfigError

BLOCK_LINEAR = re.compile(r"(single_)?transformer_blocks\.\d+\.(attn|ff|ff_context)\.")
"""Linears outside the blocks have no home in every adapter format, so they are never targets."""

TARGET_SETS = {
    "blocks": r".*",
    "attention": r".*\.attn\..*",
    "diffusers": r"transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)|single_transformer_blocks\..*",
}


def block_linears(transformer: nn.Module) -> list[str]:
    """Names of all Linears inside the transformer's blocks, in model order."""
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and BLOCK_LINEAR.match(name)
    ]


def select_targets(transformer: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """Names of the Linears that `lora.targets` means.

    Raises ConfigError if a pattern matches no block Linear.
    """
    names = block_linears(transformer)
    patterns = (TARGET_SETS[targets],) if isinstance(targets, str) else targets
    unmatched = [p for p in patterns if not any(re.fullmatch(p, name) for name in names)]
    if unmatched:
        raise ConfigError(
            f"lora.targets: {', '.join(map(repr, unmatched))} matches no Linear in a block. "
            f"A pattern must match a whole name, such as {names[0]!r} or {names[-1]!r}."
        )
    return [name for name in names if any(re.fullmatch(p, name) for p in patterns)]


def block_kind(name: str) -> str:
    """Of a module or parameter in a block: double_attn, double_ff or single.

    A single block's attention and feed-forward are one matrix.
    """
    if name.startswith("single_"):
        return "single"
    return "double_attn" if ".attn." in name else "double_ff"
