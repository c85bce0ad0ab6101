"""`kindling inspect` as a user runs it: its words, its options, its exit status."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data_tools import pictures
from scripts import kindling
from tests.unit import hostile

GOOD = """\
{root}: 4 usable pictures

Buckets at resolution 64, batch size 2
  size        pictures   batches  not full   cut off     scale
  64x64              3         2       (1)        0%      0.80
  96x32              1         1       (1)       20%      0.40
  total              4         3

Captions: 4
  shortest 1 word (b.png)
  longest 3 words (d.png)
  tokens not counted: without --config there is no base to count for
  4 of 4 have the trigger 'ohwx'
  one caption for b.png, c.png

To look at
  over 10 % is cut off: d.png

The same picture more than once
  b.png, c.png

Notes
  not read: neither picture nor caption: x.md

Ready for training.
"""


def test_report(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "x.md").write_text("x")
    argv = [str(root), "--resolution", "64", "--batch-size", "2", "--trigger", "ohwx"]
    assert kindling.main(["inspect", *argv]) == 0
    assert capsys.readouterr().out == GOOD.format(root=root)


def test_faults_end_with_status_2(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "a.png").write_bytes(b"")
    (root / "d.txt").unlink()
    assert kindling.main(["inspect", str(root), "--resolution", "64"]) == 2
    out = capsys.readouterr().out
    assert out.startswith(f"{root}: 3 usable pictures\n")
    assert "Captions: 2, 1 missing\n" in out
    assert out.endswith(
        "Faults (mend these)\n"
        "  a.png: empty file (0 bytes); get it again or remove it\n"
        "  d.png: no caption; write it in d.txt\n\n"
        "Not ready for training.\n"
    )


def test_small_pictures_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile.picture(tmp_path / "a.png", width=100, height=100)
    (tmp_path / "a.txt").write_text("x")
    assert kindling.main(["inspect", str(tmp_path), "--resolution", "256"]) == 0
    assert "  too small for the full size: a.png\n" in capsys.readouterr().out
    assert (
        kindling.main(["inspect", str(tmp_path), "--resolution", "128", "--max-upscale", "2"]) == 0
    )
    assert "  enlarged: a.png\n" in capsys.readouterr().out


def test_settings_of_a_config(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "x.yaml"
    config.write_text(
        f"name: x\ndata:\n  path: {root}\n  resolution: 64\n  trigger: nothing\n"
        "train:\n  steps: 10\n  batch_size: 3\n"
    )
    assert kindling.main(["inspect", "--config", str(config)]) == 2
    out = capsys.readouterr().out
    assert "Buckets at resolution 64, batch size 3\n" in out
    assert "0 of 4 have the trigger 'nothing'; not: a.png, b.png, c.png, d.png\n" in out
    assert kindling.main(["inspect", "--config", str(config), "--trigger", "ohwx"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name a folder of pictures, or a config with --config\n"),
        (["{here}", "--batch-size", "0"], "--batch-size must be at least 1; got 0\n"),
        (
            ["{here}", "--resolution", "100"],
            "--resolution: Input should be a multiple of 16\n",
        ),
        (["{here}/none"], "{here}/none: no such folder; data.path must be a folder of pictures\n"),
    ],
)
def test_bad_arguments(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kindling.main(["inspect", *(arg.format(here=tmp_path) for arg in argv)]) == 2
    assert capsys.readouterr().err == message.format(here=tmp_path)


@pytest.mark.parametrize(
    ("option", "file", "message"),
    [
        ("--html", "a.png", "--html: {here}/a.png must end in .html"),
        ("--json", "metadata.jsonl", "--json: {here}/metadata.jsonl must end in .json"),
        ("--html", "no/x.html", "--html: there is no folder {here}/no; make it first"),
    ],
)
def test_nothing_that_matters_is_overwritten(
    option: str, file: str, message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (root / "a.png").read_bytes()
    assert kindling.main(["inspect", str(root), option, str(root / file)]) == 2
    assert capsys.readouterr().err == message.format(here=root) + "\n"
    assert (root / "a.png").read_bytes() == before


def test_each_file_is_read_and_decoded_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[str] = Counter()
    decodes: list[Path] = []
    read, decode = pictures._bytes, pictures._decode
    monkeypatch.setattr(pictures, "_bytes", lambda path: (reads.update([path.name]), read(path))[1])
    monkeypatch.setattr(
        pictures, "_decode", lambda path, image: (decodes.append(path), decode(path, image))[1]
    )
    page = tmp_path / "x.html"
    assert kindling.main(["inspect", str(root), "--resolution", "64", "--html", str(page)]) == 0
    assert reads == Counter({"a.png": 1, "b.png": 1, "c.png": 1, "d.png": 1})
    assert len(decodes) == 4


def test_help_and_library_load_neither_torch_nor_datasets() -> None:
    code = (
        "import sys, data_tools.inspect.command\n"
        "heavy = {'torch', 'datasets', 'pandas', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_does_not_pay_for_measures(root: Path) -> None:
    code = (
        "import sys\nfrom data_tools import records\nfrom train.config import DataConfig\n"
        f"records.read(DataConfig(path={str(root)!r}, resolution=64))\n"
        "heavy = {'imagehash', 'scipy', 'data_tools.examine'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
