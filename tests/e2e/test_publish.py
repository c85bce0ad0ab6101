"""Publishing a real run: what its certificate says is true of the published file, too."""

import json

import torch

from tests.e2e.conftest import TrainRun
from train import checkpoint
from train.adapters import certify
from train.commands import publish as command
from train.config import reading
from train.loading.base import resolve


def test_the_carried_certificate_is_what_certifying_says(train_run: TrainRun, capsys) -> None:
    prompts = {"prompts": ("zibby at night",), "steps": 2, "every": 4, "width": 64, "height": 64}
    folder = train_run("published", preview=prompts)
    assert command.main([str(folder), "--title", "Zibby"]) == 1  # of no known licence
    assert "doesn't say the licence" in capsys.readouterr().out
    target = folder / "publish"
    base = resolve(reading.load(folder / "config.yaml").base)
    transformer = base.load_transformer(torch.device("cpu"))
    newest, _ = checkpoint.newest_good(folder / "checkpoints")
    assert newest is not None
    again = certify.certify(
        target / "tiny.safetensors",
        adapter=checkpoint.load(newest).adapter,
        pipeline=base.pipeline(transformer=transformer),
    )
    carried = json.loads((target / "tiny.certificate.json").read_text(encoding="utf-8"))
    assert {key: carried[key] for key in again} == again
    assert (target / "samples" / "00.png").is_file()
