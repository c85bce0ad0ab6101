"""The report of `kindling inspect`: its words, its JSON, its exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import inspect
from tests.unit import hostile


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two alike, one wide, one cut in half; captions with and without the trigger."""
    top = tmp_path / "pictures"
    for seed, name in enumerate(["a.png", "b.png"]):
        hostile.picture(top / name, width=80, height=80, seed=seed)
    (top / "c.png").write_bytes((top / "b.png").read_bytes())
    hostile.picture(top / "d.png", width=300, height=80, seed=3)
    for name, text in {"a": "ohwx runs", "b": "ohwx", "c": "ohwx", "d": "小火 ohwx"}.items():
        (top / f"{name}.txt").write_text(text, encoding="utf-8")
    return top


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
  lose over 10 % of their area: d.png

The same picture more than once
  b.png, c.png

Notes
  not read: neither picture nor caption: x.md

Ready for training.
"""


def test_report(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "x.md").write_text("x")
    argv = [str(root), "--resolution", "64", "--batch-size", "2", "--trigger", "ohwx"]
    assert inspect.main(argv) == 0
    assert capsys.readouterr().out == GOOD.format(root=root)


def test_faults_end_with_status_2(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "a.png").write_bytes(b"")
    (root / "d.txt").unlink()
    assert inspect.main([str(root), "--resolution", "64"]) == 2
    out = capsys.readouterr().out
    assert out.startswith(f"{root}: 3 usable pictures\n")
    assert "Captions: 2, 1 missing\n" in out
    assert out.endswith(
        "Faults (mend these)\n"
        "  a.png: empty file (0 bytes); get it again or remove it\n"
        "  d.png: no caption; write it in d.txt\n\n"
        "Not ready for training.\n"
    )


def test_json(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert inspect.main([str(root), "--resolution", "64", "--json", str(file)]) == 0
    facts = json.loads(file.read_text(encoding="utf-8"))
    assert facts["ready"] is True
    assert facts["pictures"] == 4
    assert facts["duplicates"] == facts["same_caption"] == [["b.png", "c.png"]]
    assert facts["buckets"][0] == {
        "geometry": {"width": 64, "height": 64},
        "pictures": 3,
        "showings": 3,
        "batches": 3,
        "partial": [],
        "crop": 0.0,
        "scale": 0.8,
    }
    assert facts["records"][3]["caption"] == "小火 ohwx"


def test_small_pictures_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile.picture(tmp_path / "a.png", width=100, height=100)
    (tmp_path / "a.txt").write_text("x")
    assert inspect.main([str(tmp_path), "--resolution", "256"]) == 0
    assert "  too small for the full size: a.png\n" in capsys.readouterr().out
    assert inspect.main([str(tmp_path), "--resolution", "128", "--max-upscale", "2"]) == 0
    assert "  are enlarged: a.png\n" in capsys.readouterr().out


def test_settings_of_a_config(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "x.yaml"
    config.write_text(
        f"name: x\ndata:\n  path: {root}\n  resolution: 64\n  trigger: nothing\n"
        "train:\n  steps: 10\n  batch_size: 3\n"
    )
    assert inspect.main(["--config", str(config)]) == 2
    out = capsys.readouterr().out
    assert "Buckets at resolution 64, batch size 3\n" in out
    assert "0 of 4 have the trigger 'nothing'; not: a.png, b.png, c.png, d.png\n" in out
    assert inspect.main(["--config", str(config), "--trigger", "ohwx"]) == 0


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
    assert inspect.main([arg.format(here=tmp_path) for arg in argv]) == 2
    assert capsys.readouterr().err == message.format(here=tmp_path)


def test_help_and_library_load_neither_torch_nor_datasets() -> None:
    code = (
        "import sys, data_tools.inspect\n"
        "heavy = {'torch', 'datasets', 'pandas', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
