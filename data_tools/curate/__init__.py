"""Curation: a recipe of what is left out, cropped, balanced and held out."""
