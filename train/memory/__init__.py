"""Frozen blocks and activations between RAM and the GPU."""
