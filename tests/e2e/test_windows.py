"""The whole job on a Python that refuses what Windows refuses: see tests/windows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests import runs

EACH = """
import json, sys
from scripts import kindling
for arguments in json.loads(sys.argv[1]):
    print(*arguments, "->", kindling.main(arguments), flush=True)
"""
"""Several commands in one process, for imports take longer than they do."""


def run(*arguments: str, folder: Path) -> str:
    """A program's output, from a process in a folder, on a console of code page 1252."""
    place = {
        "PYTHONPATH": os.pathsep.join([str(runs.ROOT / "tests" / "windows"), str(runs.ROOT)]),
        "PYTHONIOENCODING": "cp1252",
        "KINDLING_WINDOWS": str(folder),
        "TMPDIR": str(folder),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=runs.environment() | place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="cp1252",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_command_does_its_work_there(tmp_path: Path, dev_folder: Path):
    pictures = runs.make_pictures(tmp_path / "图片")
    runs.draw_picture(pictures / "小狗 ①.png", seed=9)
    (pictures / "小狗 ①.txt").write_text("小狗 zibby", encoding="utf-8")
    runs.draw_picture(tmp_path / "named" / "红狐狸.png")
    tree = runs.settings(
        tmp_path,
        model=dev_folder,
        pictures=pictures,
        base={"quantize": "int8"},
        preview={"prompts": ["小狗 zibby"], "every": 2, "steps": 2, "width": 64, "height": 64},
        train={"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 2, "ema": 0.9},
        validation={"pictures": "training"},
    )
    config, base = str(runs.write_config(tmp_path / "配置.yaml", tree)), str(dev_folder)
    train = (str(runs.ROOT / "train.py"), "--config", config)
    assert r"图片".encode("ascii", "backslashreplace").decode() in run(*train, folder=tmp_path)
    output = run(*train, "--resume", "--accept-changes", "train.steps=5", folder=tmp_path)
    assert "certificate: loads in diffusers and in ComfyUI" in output

    rules = {"source": "图片", "output": "curated"}
    runs.write_config(tmp_path / "rules.yaml", rules)
    folder, adapter = "runs/tiny", "runs/tiny/tiny.safetensors"
    commands = (
        ("inspect", "图片", "--html", "page.html", "--json", "facts.json"),
        ("plan", "--config", config),
        ("pack", "图片", "packed.parquet"),
        ("pack", "图片", "packed.tar"),
        ("import", "packed.parquet", "unpacked"),
        ("import", "packed.tar", "untarred"),
        ("caption", "named", "--captioner", "filename"),
        ("export", folder),
        ("export", folder, "--format", "kohya"),
        ("certify", adapter, "--base", base),
        ("convert", adapter, "kohya.safetensors", "--to", "kohya"),
        ("resize", adapter, "small.safetensors", "--rank", "2"),
        ("merge", adapter, "kohya.safetensors", "--output", "both.safetensors"),
        ("curate", "rules.yaml"),
        ("compare", folder, "--checkpoints"),
        ("generate", "--base", base, "--lora", adapter, "--prompt", "小狗"),
        ("doctor",),
    )
    forbidden = ("publish", folder, "--author", "作者")  # as it ends where a base has no licence
    output = run("-c", EACH, json.dumps([*commands, forbidden]), folder=tmp_path)
    failed = [line for line in output.splitlines() if re.search("-> [1-9]", line)]
    assert output.count("-> 0\n") == len(commands), "\n".join([*failed, output])
    assert [line.split()[0] for line in failed] == ["publish"]
    assert "doesn't say the licence" in output
