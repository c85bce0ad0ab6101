"""A base in parts: each block is cut as soon as it is whole, whatever it is loaded from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import bfl, damage, tiny
from train.errors import CheckpointError
from train.loading import kept, transformer
from train.loading.stored import Stored
from train.loading.weights import Files

CPU = torch.device("cpu")
transformer_empty = transformer.empty
DOUBLE, SINGLE = 4, 9
SMALL = 4096
"""Bytes: more than all norms have."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer of some blocks, fp32."""
    folder = tmp_path_factory.mktemp("folder") / "transformer"
    model = tiny.transformer(guidance=True, double=DOUBLE, single=SINGLE)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def single(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as one file in BFL's names, whose q, k and v are one."""
    model = tiny.transformer(guidance=True, double=DOUBLE, single=SINGLE)
    return bfl.save(bfl.tensors(model), tmp_path_factory.mktemp("single") / "bfl.safetensors")


class Cutter:
    """Leaves no weight of what it is given."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.most = 0
        """Bytes of weights in the model at any time."""

    def look(self, model: nn.Module) -> None:
        weights = (weight for weight in model.parameters() if not weight.is_meta)
        self.most = max(self.most, sum(weight.nbytes for weight in weights))

    def __call__(self, module: nn.Module) -> None:
        self.modules.append(module)
        assert not any(parameter.is_meta for parameter in module.parameters())
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                nothing = torch.empty(0, dtype=parameter.dtype)
                setattr(part, name, nn.Parameter(nothing, requires_grad=False))


Load = Callable[..., tuple[nn.Module, Cutter]]


@pytest.fixture
def load(folder: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads with a cache and cuts; the cutter looks at the model whenever something is read."""

    def load(kind: str, *, file: bool = False, main: bool = True) -> tuple[nn.Module, Cutter]:
        cutter, read, made = Cutter(), Stored.read, []

        def empty(files: Files) -> nn.Module:
            made.append(transformer_empty(files))
            return made[-1]

        def looking(self: Stored, rows: tuple[int, int] | None = None) -> Tensor:
            cutter.look(made[-1])
            return read(self, rows)

        home = None if file else folder
        files = Files(folder / "config.json", home, single if file else None, torch.float32, kind)
        with monkeypatch.context() as patch:
            patch.setattr(transformer, "empty", empty)
            patch.setattr(Stored, "read", looking)
            return transformer.load(files, CPU, cache=tmp_path, cut=cutter, main=main), cutter

    return load


def sizes(files: Files) -> tuple[int, int, int]:
    """Bytes of all weights, of the largest block, and outside of blocks."""
    blocks: dict[str, int] = {}
    for name, weight in transformer.empty(files).named_parameters():
        block = transformer._block_of(name)
        blocks[block] = blocks.get(block, 0) + weight.nbytes
    outside = blocks.pop("")
    return outside + sum(blocks.values()), max(blocks.values()), outside


@pytest.mark.parametrize(
    ("kind", "file"),
    [("none", False), ("none", True), ("int8", False)],
    ids=["folder", "single file", "copy"],
)
def test_one_block_at_most_is_whole(load: Load, folder: Path, kind: str, file: bool) -> None:
    """Beside it only what is outside of blocks, and norms."""
    if kind != "none":
        load(kind)
    model, cutter = load(kind, file=file)
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]  # pyright: ignore
    assert cutter.modules == [*blocks, model]
    files = Files(folder / "config.json", folder, None, torch.float32, kind)
    whole, block, outside = sizes(files)
    assert cutter.most <= block + outside + SMALL < 0.6 * whole


def test_the_order_is_that_of_the_source(load: Load, folder: Path, tmp_path: Path) -> None:
    """So that some processes may read the copy and others make it."""
    load("nf4")
    (copy,) = (tmp_path / kept.FOLDER).iterdir()
    files = Files(folder / "config.json", folder, None, torch.float32, "nf4")
    made = [name for name, _ in transformer._from_source(files, CPU)]
    assert [name for name, _ in kept.read(copy, CPU)] == made


def test_one_process_writes_the_copy_and_shows_progress(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shown = []
    bar = transformer.tqdm

    def noting(tensors: object, *, disable: bool, **settings: object) -> object:
        shown.append(not disable)
        return bar(tensors, disable=True)  # pyright: ignore

    monkeypatch.setattr(transformer, "tqdm", noting)
    load("fp8", main=False)
    assert not (tmp_path / kept.FOLDER).exists()
    load("fp8")
    assert len(list((tmp_path / kept.FOLDER).iterdir())) == 1
    assert shown == [False, True]
    assert capsys.readouterr().out == ""


def test_a_damaged_copy_ends_the_start_and_the_next_one_makes_it_anew(
    load: Load, tmp_path: Path
) -> None:
    """Others may have cut other blocks by then, and with ZeRO-3 all must come in one order."""
    load("fp8")
    (copy,) = (tmp_path / kept.FOLDER).iterdir()
    damage.flip_bit(copy / "00000.safetensors")
    says = r"is damaged \(.* checksum\); it is deleted\. Start again: it is made anew\."
    with pytest.raises(CheckpointError, match=says):
        load("fp8")
    assert not copy.exists()
    load("fp8")
    assert copy.exists()
