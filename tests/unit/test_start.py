"""What a start imports: light command lines, and the launcher beside the package of its name."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import kindling

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, cwd: Path) -> str:
    """Run this Python; its output, stripped."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_config_and_command_line_come_without_torch() -> None:
    names = [path.stem for path in (ROOT / "train" / "config").glob("[a-z]*.py")]
    heavy = {"torch", "numpy", "diffusers", "transformers"}
    code = "import sys, scripts.kindling\n"
    code += f"from train.config import {', '.join(names)}\n"
    code += f"print(sorted({heavy} & set(sys.modules)))"
    assert "reading" in names
    assert python("-c", code, cwd=ROOT) == "[]"


def test_help_comes_without_pydantic() -> None:
    code = "import sys, scripts.kindling; print('pydantic' in sys.modules)"
    assert python("-c", code, cwd=ROOT) == "False"


@pytest.mark.parametrize(
    "command", [*kindling.COMMANDS, "bench train", "bench start", "bench data"]
)
def test_help_of_a_command_comes_without_torch(command: str) -> None:
    code = (
        "import sys\nfrom scripts import kindling\n"
        f"try:\n    kindling.main([*{command.split()}, '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print({'torch', 'diffusers', 'transformers', 'datasets', 'httpx'} & set(sys.modules))"
    )
    said = python("-c", code, cwd=ROOT)
    assert said.startswith(f"usage: kindling {command} ")
    assert said.endswith("\nset()")


@pytest.mark.parametrize("first", ["train", "data_tools.records", "scripts.toy.vae", "tests.tiny"])
def test_bitsandbytes_is_quiet_whatever_is_imported_first(first: str) -> None:
    """It warns as it is imported, on CPUs with AVX512-BF16 only: so its level is looked at."""
    code = (
        f"import logging, {first}\n"
        "print(logging.getLogger('bitsandbytes.backends.cpu.ops').level == logging.ERROR)"
    )
    assert python("-c", code, cwd=ROOT) == "True"


@pytest.mark.parametrize("is_package", [True, False])
def test_the_launcher_finds_the_package_of_its_own_name(tmp_path: Path, is_package: bool) -> None:
    """`train.py` beside `train/` imports from the folder, and only thanks to its __init__.py."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "part.py").write_text("place = 'package'\n")
    if is_package:
        (tmp_path / "train" / "__init__.py").touch()
    launcher = "try:\n    from train import part\nexcept ImportError:\n    print('lost')\n"
    (tmp_path / "train.py").write_text(launcher + "else:\n    print(part.place)\n")
    answer = python("-S", "train.py", cwd=tmp_path)  # -S: without the installed Kindling
    assert answer.splitlines()[0] == ("package" if is_package else "lost")


def test_the_package_wins_over_the_launcher_here() -> None:
    assert (ROOT / "train" / "__init__.py").is_file()
    found = python("-c", "import train; print(train.__file__)", cwd=ROOT)
    assert Path(found) == ROOT / "train" / "__init__.py"
