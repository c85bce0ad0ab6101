"""Files that are broken, foreign or meant to do harm: each command says so in a sentence."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scripts import kindling
from tests import tiny
from tests.unit.adapters.state import random_lora, save

QUERY = "transformer.transformer_blocks.0.attn.to_q"


class Bomb:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def raw(path: Path, header: object, body: bytes = b"", *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def cut(path: Path, *, keep: int) -> None:
    save(random_lora(1), path)
    path.write_bytes(path.read_bytes()[:keep])


def stating(path: Path, **settings: object) -> None:
    """With peft's settings in its metadata."""
    text = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    save(random_lora(1), path, {"lora_adapter_metadata": text})


def with_alpha(path: Path, alpha: float) -> None:
    changed(path, add={f"{QUERY}.alpha": torch.tensor(alpha)})


def torch_pickle(path: Path) -> None:
    torch.save({"weight": Bomb(path.parent / "exploded")}, path)


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(path.parent / "exploded")))


def huge_header(path: Path) -> None:
    with path.open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate((1 << 30) + 16)


def overlapping(path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    raw(path, {f"{QUERY}.lora_A.weight": entry, f"{QUERY}.lora_B.weight": entry}, bytes(16))


def beyond_the_end(path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    raw(path, {f"{QUERY}.lora_A.weight": entry})


def with_numbers(path: Path, value: float) -> None:
    state = random_lora(1)
    state[f"{QUERY}.lora_B.weight"][3, 1] = value
    save(state, path)


def base_checkpoint(path: Path) -> None:
    transformer = tiny.transformer(guidance=True)
    save_file({k: v.contiguous() for k, v in transformer.state_dict().items()}, path)


def foreign(path: Path, *names: str, size: tuple[int, int] = (8, 8)) -> None:
    state = {}
    for name in names:
        state[f"{name}.lora_down.weight"] = torch.ones(2, size[1])
        state[f"{name}.lora_up.weight"] = torch.ones(size[0], 2)
    save(state, path)


def flux1(path: Path) -> None:
    state = {}
    for i in range(19):
        for part, (rows, _) in {
            "img_attn_qkv": (9216, 3072),
            "img_mlp_0": (12288, 3072),
        }.items():
            name = f"lora_unet_double_blocks_{i}_{part}"
            state[f"{name}.lora_down.weight"] = torch.ones(1, 3072)
            state[f"{name}.lora_up.weight"] = torch.ones(rows, 1)
    save(state, path)


def pair(down: tuple[int, ...], up: tuple[int, ...]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        halves = {"A": torch.ones(down), "B": torch.ones(up)}
        save({f"{QUERY}.lora_{half}.weight": tensor for half, tensor in halves.items()}, path)

    return make


def changed(path: Path, *, drop: str = "", add: dict | None = None) -> None:
    state = {key: t for key, t in random_lora(1).items() if not drop or drop not in key}
    save(state | (add or {}), path)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "there is no such file"),
    "empty": (lambda path: path.write_bytes(b""), "cut off or damaged"),
    "cut in the header": (lambda path: cut(path, keep=300), "cut off or damaged"),
    "cut in the body": (lambda path: cut(path, keep=20000), "cut off or damaged"),
    "pickle": (plain_pickle, "a pickle under a safetensors name"),
    "torch.save": (torch_pickle, "a pickle under a safetensors name"),
    "GGUF": (lambda path: path.write_bytes(b"GGUF" + bytes(99)), "a GGUF file"),
    "Git LFS": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "a pointer of Git LFS",
    ),
    "header of a gigabyte": (huge_header, "not a whole safetensors file"),
    "header that isn't JSON": (lambda path: raw(path, b"{]"), "not a whole safetensors file"),
    "header that is a list": (lambda path: raw(path, [1]), "not a whole safetensors file"),
    "header without end": (lambda p: raw(p, {}, length=1 << 62), "not a whole safetensors file"),
    "overlapping tensors": (overlapping, "not a whole safetensors file"),
    "offsets beyond the end": (beyond_the_end, "not a whole safetensors file"),
    "no tensors": (lambda path: save({}, path), "holds no tensors"),
    "a base": (base_checkpoint, "holds whole weights: it is a base model"),
    "SDXL": (
        lambda p: foreign(p, "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
        "an adapter of SDXL or SD 1.5, not of FLUX.2",
    ),
    "FLUX.1": (flux1, "an adapter of FLUX.1, not of FLUX.2"),
    "FLUX.1 of diffusers": (
        lambda p: foreign(p, "transformer.single_transformer_blocks.0.proj_mlp"),
        "an adapter of FLUX.1, not of FLUX.2",
    ),
    "Qwen-Image": (
        lambda p: foreign(p, "transformer.transformer_blocks.0.img_mlp.net.2"),
        "an adapter of Qwen-Image, not of FLUX.2",
    ),
    "names of nothing": (lambda p: foreign(p, "some.thing"), "no name in it is one of FLUX.2's"),
    "LoHa": (
        lambda path: save({f"{QUERY}.hada_w1_a": torch.ones(2, 2)}, path),
        "a LoHa adapter",
    ),
    "three dimensions": (pair((2, 8, 1), (8, 2)), "aren't (rank, in) and (out, rank)"),
    "ranks that differ": (pair((2, 8), (8, 3)), "aren't (rank, in) and (out, rank)"),
    "no ranks": (pair((0, 8), (8, 0)), "aren't (rank, in) and (out, rank)"),
    "damaged settings": (
        lambda path: save(random_lora(1), path, {"lora_adapter_metadata": "{"}),
        "lora_adapter_metadata is damaged",
    ),
    "a stated rank of 0": (lambda p: stating(p, r=0, lora_alpha=1), "damaged (a rank of 0)"),
    "a stated alpha of NaN": (
        lambda p: stating(p, r=1, lora_alpha=float("nan")), "damaged (an alpha of nan)"
    ),
    "a pattern that never ends": (
        lambda p: stating(p, r=1, lora_alpha=1, alpha_pattern={r"(\w+\.?)+x": 1}),
        "repeats a group",
    ),
}  # fmt: skip

INCOMPLETE: dict[str, tuple[Callable[[Path], object], str]] = {
    "half a pair": (
        lambda path: changed(path, drop="transformer_blocks.0.attn.to_q.lora_B"),
        "has no lora_B/lora_up",
    ),
    "an unknown key": (
        lambda path: changed(path, add={"strange": torch.ones(2)}),
        "'strange' is no key of a known layout",
    ),
    "LoHa beside LoRA": (
        lambda path: changed(path, add={f"{QUERY}.hada_w1_a": torch.ones(2, 2)}),
        "holds LoHa, which can't be converted",
    ),
    "one weight by two names": (
        lambda path: changed(
            path,
            add={
                "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.ones(16, 2),
                "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 16),
            },
        ),
        "is the same weight as",
    ),
    "an alpha of NaN": (lambda path: with_alpha(path, float("nan")), "to_q.alpha is nan"),
    "an alpha of infinity": (lambda path: with_alpha(path, float("inf")), "to_q.alpha is inf"),
    "NaN": (lambda path: with_numbers(path, float("nan")), "aren't finite"),
    "infinity": (lambda path: with_numbers(path, float("inf")), "aren't finite"),
}


def commands(path: Path) -> dict[str, list[str]]:
    output = str(path.with_name("output.safetensors"))
    return {
        "convert": ["convert", str(path), output, "--to", "kohya"],
        "resize": ["resize", str(path), output, "--rank", "1"],
        "merge": ["merge", str(path), "--output", output],
    }


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", ["certify", "convert", "resize", "merge"])
def test_files_that_are_no_adapter(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = FILES[name]
    path = tmp_path / "a.safetensors"
    make(path)
    before = sorted(tmp_path.iterdir())
    arguments = {"certify": ["certify", str(path)], **commands(path)}[command]
    assert kindling.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(str(path))
    assert len(error.strip()) < 500
    assert sorted(tmp_path.iterdir()) == before
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", INCOMPLETE)
@pytest.mark.parametrize("command", ["convert", "resize", "merge"])
def test_files_that_would_lose_something(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = INCOMPLETE[name]
    path = tmp_path / "a.safetensors"
    make(path)
    assert kindling.main(commands(path)[command]) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("command", ["convert", "resize", "merge"])
def test_a_file_may_replace_itself(command: str, tmp_path: Path) -> None:
    path = save(random_lora(1), tmp_path / "a.safetensors")
    arguments = [
        text.replace("output.safetensors", "a.safetensors") for text in commands(path)[command]
    ]
    assert kindling.main(arguments) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
