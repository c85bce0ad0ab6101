"""`kindling caption` as a user runs it."""

import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from data_tools.caption.captioners import models
from scripts import kindling
from tests import tiny_vision
from tests.runs import ROOT
from tests.unit.caption.fake_server import Reply, Request, serve
from tests.unit.caption.shades import command, plain, rows, run, shade_of, snapshot, trained


def test_a_folder_becomes_a_data_set(root: Path, capsys: pytest.CaptureFixture) -> None:
    before = snapshot(root)
    with serve(plain) as target:
        assert run(target, root) == 0
    wanted = {f"{number}.png": f"zibby stands in shade {number}." for number in range(6)}
    assert trained(root) == wanted
    after = snapshot(root)
    assert after.pop("metadata.jsonl")
    assert after == before
    assert capsys.readouterr().out == (
        f"{root}: 6 pictures, 0 with a caption; 6 to caption\n"
        f"wrote {root}/metadata.jsonl\n"
        "6 captions:\n"
        "  0.png: zibby stands in shade 0.\n"
        "  1.png: zibby stands in shade 1.\n"
        "  2.png: zibby stands in shade 2.\n"
        "  ... and 3 more\n"
    )


def test_masks_are_no_pictures_to_caption(root: Path) -> None:
    for name in ("0.mask.png", "1-masklabel.png"):
        shutil.copy(root / "2.png", root / name)
    with serve(plain) as target:
        assert run(target, root, "--add-unlisted") == 0
        assert len(target.requests) == 6
        assert run(target, root, "--add-unlisted", "--replace") == 0
    assert rows(root / "metadata.jsonl").keys() == {f"{number}.png" for number in range(6)}


def test_sidecars(root: Path) -> None:
    (root / "1.txt").write_text("mine\n")
    with serve(plain) as target:
        assert run(target, root, "--write", "sidecars") == 0
        assert len(target.requests) == 5
    assert (root / "1.txt").read_text() == "mine\n"
    assert trained(root)["2.png"] == "zibby stands in shade 2."
    assert not list(root.glob("*.bak*"))
    assert not (root / "metadata.jsonl").exists()


def test_captions_that_exist_are_taken_over(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / "1.txt").write_text("mine\n")
    with serve(plain) as target:
        assert run(target, root) == 0
    assert rows(root / "metadata.jsonl")["1.png"] == {"text": "mine"}
    assert "the .txt files stay and are no longer read" in capsys.readouterr().out


def test_unlisted_pictures_are_taken_in_when_told(root: Path) -> None:
    (root / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "mine"}\n')
    with serve(plain) as target:
        assert run(target, root, "--add-unlisted") == 0
    assert trained(root)["1.png"] == "mine"
    assert trained(root)["5.png"] == "zibby stands in shade 5."


def test_output_elsewhere(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = snapshot(root)
    output = tmp_path / "try.jsonl"
    with serve(plain) as target:
        assert run(target, root, "--output", str(output), "--limit", "2") == 0
        assert "2 to caption, 4 left out" in capsys.readouterr().out
        assert run(target, root, "--output", str(output)) == 2
        assert f"{output} exists already" in capsys.readouterr().err
        assert run(target, root, "--output", str(output), "--replace") == 0
        assert len(target.requests) == 6  # two were in the journal
    assert len(rows(output)) == 6
    assert output.with_name("try.jsonl.bak").exists()
    assert snapshot(root) == before
    assert not list(root.glob(".*"))


@pytest.mark.parametrize("kind", ["base", "hf"])
def test_a_local_model(
    root: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = {"base": tiny_vision.make_dev, "hf": tiny_vision.make_qwen}[kind]
    folder = str(make(tmp_path / "model"))
    opener = {"base": "of_base", "hf": "of_hub"}[kind]
    real = getattr(models, opener)

    def scripted(*arguments: Any, **settings: Any) -> Any:
        captioner = real(*arguments, **settings)
        tiny_vision.script(captioner, [f"a fox, shade {number}" for number in range(6)])
        return captioner

    monkeypatch.setattr(models, opener, scripted)
    spec = ["base", "--base", folder] if kind == "base" else [f"hf:{folder}"]
    argv = [str(root), "--captioner", *spec, "--for", "style", "--dtype", "fp32"]
    assert kindling.main(["caption", *argv, "--batch-size", "4"]) == 0
    assert trained(root)["5.png"] == "a fox, shade 5"


# ---- what can't be done


def test_sidecars_beside_a_metadata_file(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / "metadata.jsonl").write_text('{"file_name": "1.png"}\n')
    assert (
        kindling.main(["caption", str(root), "--captioner", "filename", "--write", "sidecars"]) == 2
    )
    assert "with it .txt files are not read" in capsys.readouterr().err


def test_a_broken_metadata_file_is_not_rewritten(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / "metadata.jsonl").write_text('{"file_name": "1.png"}\n{"file_na\n')
    assert kindling.main(["caption", str(root), "--captioner", "filename"]) == 2
    assert "metadata.jsonl:2: broken JSON" in capsys.readouterr().err


def test_nothing_to_do(root: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(6):
        (root / f"{number}.txt").write_text("mine")
    before = snapshot(root)
    assert kindling.main(["caption", str(root), "--captioner", "base", "--for", "style"]) == 0
    assert "nothing to do; --replace would caption them anew" in capsys.readouterr().out
    assert snapshot(root) == before


def test_no_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert kindling.main(["caption", str(tmp_path), "--captioner", "filename"]) == 2
    assert "no pictures" in capsys.readouterr().err


# ---- stopped from outside


@pytest.mark.parametrize("write", ["metadata", "sidecars"])
def test_killed_it_goes_on_where_it_was(root: Path, write: str) -> None:
    """kill -9 while the fourth picture is asked about; the first three are never asked again."""
    slow = True

    def answer(request: Request, _: int) -> Reply:
        if slow and shade_of(request) == 3:
            return Reply(None, stall=True)
        return plain(request)

    with serve(answer) as target:
        arguments = command(target, root, "--write", write)
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(4):
            assert target.arrived.acquire(timeout=300)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (root / "metadata.jsonl").exists()
        slow = False
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
        assert [shade_of(request) for request in target.requests] == [0, 1, 2, 3, 3, 4, 5]
    earlier = "3 of them in an earlier run" if write == "metadata" else "3 with a caption"
    assert earlier in done.stdout
    assert trained(root) == {f"{n}.png": f"zibby stands in shade {n}." for n in range(6)}


def test_interrupted_it_ends_at_once(root: Path) -> None:
    """Ctrl-C while a request hangs: no traceback, no waiting for the server."""

    def answer(request: Request, _: int) -> Reply:
        return plain(request) if shade_of(request) < 2 else Reply(None, stall=True)

    with serve(answer) as target:
        process = subprocess.Popen(
            command(target, root),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # a shell's background jobs, and what they start, are born deaf to it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        for _ in range(3):
            assert target.arrived.acquire(timeout=300)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=150)[1].decode()
    assert process.returncode == 130
    assert "2 of 6 captions are finished and kept" in error
    assert "Traceback" not in error
