"""Adapter files: what is in one, what each loader does with it, writing and converting them."""
