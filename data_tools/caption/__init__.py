"""Captioning: captioners behind one interface, and the command that asks them."""
