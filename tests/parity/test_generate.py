"""`kindling generate` draws what diffusers' own pipeline draws, to the bit."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from PIL import Image

from tests import runs, tiny
from tests.interop import common
from train.adapters import export, usage
from train.commands import generate as command

PROMPTS = ["a red circle", "blue"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of different ranks, for both tiny bases; the second as kohya's trainer writes it."""
    folder = tmp_path_factory.mktemp("adapters")
    transformer = tiny.transformer(guidance=True)
    paths = [folder / "one.safetensors", folder / "two.safetensors"]
    for rank, (path, layout) in enumerate(zip(paths, ("diffusers", "kohya"), strict=True), 2):
        adapter = common.random_adapter(transformer, rank=rank)
        export.write(adapter, path, dtype=torch.float32, metadata={}, layout=layout)
    return paths


def pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    kind = Flux2Pipeline if index["_class_name"] == "Flux2Pipeline" else Flux2KleinPipeline
    found = kind.from_pretrained(folder, dtype=dtype)
    found.set_progress_bar_config(disable=True)
    return found


def expected(pipe: Any, prompt: str, seed: int, **settings: Any) -> bytes:
    return pipe(
        prompt=prompt,
        generator=torch.Generator().manual_seed(seed),
        max_sequence_length=pipe.tokenizer.model_max_length,
        **settings,
    ).images[0].tobytes()  # fmt: skip


def generate(tmp_path: Path, base: Path, *arguments: str) -> list[bytes]:
    output = tmp_path / "out"
    common_arguments = ["--base", str(base), "--dtype", "fp32", "--cache", str(tmp_path / "cache")]
    assert command.main([*common_arguments, "--output", str(output), *arguments]) == 0
    found = []
    for path in sorted(output.glob("0*.png")):
        with Image.open(path) as picture:
            found.append(picture.tobytes())
    return found


@pytest.mark.parametrize("family", ["dev", "klein"])
def test_pictures_are_the_pipelines(
    family: str, adapters: list[Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(f"{family}_folder")
    pipe = pipeline(folder)
    settings = {"width": 80, "height": 64, "num_inference_steps": 3, "guidance_scale": 3.0}
    plain = [expected(pipe, prompt, seed, **settings) for prompt in PROMPTS for seed in (5, 6)]
    for name, path in zip("ab", adapters, strict=True):
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, -1.0])
    adapted = [expected(pipe, prompt, seed, **settings) for prompt in PROMPTS for seed in (5, 6)]
    assert set(plain).isdisjoint(adapted)

    same = ["--size", "80x64", "--steps", "3", "--guidance", "3", "--seed", "5", "--seeds", "2"]
    same += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    lora = ["--lora", f"{adapters[0]}=0.5", "--lora", f"{adapters[1]}=-1"]
    assert generate(tmp_path / "plain", folder, *same) == plain
    assert generate(tmp_path / "adapted", folder, *same, *lora) == adapted
    if family == "dev":
        streamed = generate(tmp_path / "streamed", folder, *same, *lora, "--resident-blocks", "1")
        assert streamed == adapted


def test_references_are_the_pipelines(dev_folder: Path, tmp_path: Path) -> None:
    paths = [
        runs.draw_picture(tmp_path / f"{seed}.png", size=size, seed=seed)
        for seed, size in enumerate([(96, 64), (72, 130)])
    ]
    pipe = pipeline(dev_folder)
    settings = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 4.0}
    images = [Image.open(path) for path in paths]
    wanted = expected(pipe, "a red circle", 0, image=images, **settings)
    assert wanted != expected(pipe, "a red circle", 0, **settings)
    references = [word for path in paths for word in ("--reference", str(path))]
    asked = ["--prompt", "a red circle", "--size", "64", "--steps", "2", *references]
    assert generate(tmp_path, dev_folder, *asked) == [wanted]


def test_a_distilled_base_takes_four_steps_and_no_guidance(tmp_path: Path) -> None:
    folder = tiny.make_klein(tmp_path / "klein", distilled=True)
    settings = {"width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": 1.0}
    wanted = expected(pipeline(folder), "blue", 0, **settings)
    assert generate(tmp_path, folder, "--prompt", "blue", "--size", "64") == [wanted]


def test_the_script_beside_an_adapter_runs_and_draws_the_same(
    adapters: list[Path], klein_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapters[0]
    about = usage.Usage(
        file=adapter.name,
        pipeline="Flux2KleinPipeline",
        base=str(klein_folder),
        released=None,
        distilled=False,
        prompt='a "red" circle 角色',
        side=64,
        tokens=pipeline(klein_folder).tokenizer.model_max_length,
    )
    script = adapter.parent / "one.diffusers.py"
    script.write_text(usage.diffusers_snippet(about), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))
    asked = ["--prompt", about.prompt, "--size", "64", "--lora", str(adapter), "--dtype", "bf16"]
    (ours,) = generate(tmp_path, klein_folder, *asked)
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.tobytes() == ours
