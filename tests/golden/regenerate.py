"""python -m tests.golden.regenerate: write losses.json anew. Say why in the commit."""

import json
import tempfile
from pathlib import Path

import torch

from tests.golden import golden

if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = golden.figures(Path(folder))
    golden.LOSSES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
