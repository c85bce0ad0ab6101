"""Adapter files: what is in one, what each loader does with it, writing and converting them."""

LAYOUTS = ("diffusers", "comfyui", "kohya")
"""That are written; `write` says what they are."""
