"""The command line's frame: dispatch, errors and exit codes, the setup, the summary of check.py."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from scripts import check, kindling, setup_env
from train.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert kindling.main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in kindling.COMMANDS)
    assert "accelerate launch train.py" in text
    assert max(map(len, text.splitlines())) <= 80


def test_without_a_command_help_goes_to_stderr(capsys: pytest.CaptureFixture) -> None:
    assert kindling.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == kindling.help_text()


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("exprot", "did you mean 'export'?"),
        ("Inspect", "did you mean 'inspect'?"),
        ("xyz", "there are"),
    ],
)
def test_unknown_command(typed: str, answer: str, capsys: pytest.CaptureFixture) -> None:
    assert kindling.main([typed]) == 2
    error = capsys.readouterr().err
    assert repr(typed) in error
    assert answer in error


@pytest.mark.parametrize("name", kindling.COMMANDS)
def test_every_command_has_a_module_with_main(name: str) -> None:
    path = ROOT / (kindling.COMMANDS[name].module.replace(".", "/") + ".py")
    functions = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    main = next(function for function in functions if function.name == "main")
    assert [argument.arg for argument in main.args.args] == ["argv"]


def test_arguments_and_exit_code_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    module = ModuleType("fake")
    module.main = lambda argv: seen.append(argv) or 7  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(importlib, "import_module", lambda name: seen.append(name) or module)
    assert kindling.main(["bench", "--json", "x"]) == 7
    assert seen == ["scripts.bench", ["--json", "x"]]


def test_user_error_is_a_message(capsys: pytest.CaptureFixture) -> None:
    def run() -> int:
        raise ConfigError("x.yaml:3: lora.rnk: unknown key")

    assert kindling.run_main(run) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "x.yaml:3: lora.rnk: unknown key\n")


def test_interrupt_has_the_shells_exit_code(capsys: pytest.CaptureFixture) -> None:
    def run() -> int:
        raise KeyboardInterrupt

    assert kindling.run_main(run) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        kindling.run_main(lambda: 1 // 0)


def run_unread(*arguments: str, both: bool = False, **environment: str) -> tuple[int, str]:
    """Run Python with nobody at the other end of stdout, or of both outputs; code and stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=writer,
        stderr=writer if both else subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    return done.returncode, done.stderr or ""


PIPES = pytest.mark.skipif(sys.platform == "win32", reason="pipes break in another way there")


@PIPES
@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [
        ("--help", ""),
        ("--help", "1"),
        ("merge --help", ""),  # unbuffered, argparse takes no notice
        ("inspect scripts/toy/data/style --resolution 64", ""),
        ("inspect scripts/toy/data/style --resolution 64", "1"),
    ],
)
def test_output_that_nobody_reads_ends_a_command_quietly(arguments: str, unbuffered: str) -> None:
    """As `yes` is ended by `head`: 128 + SIGPIPE, and no complaint."""
    command = ["-m", "scripts.kindling", *arguments.split()]
    code, error = run_unread(*command, PYTHONUNBUFFERED=unbuffered)
    assert code == 141
    assert "Traceback" not in error
    assert "BrokenPipe" not in error


@PIPES
def test_an_error_that_nobody_reads_ends_quietly_too() -> None:
    assert run_unread("-m", "scripts.kindling", "nonsense", both=True)[0] == 141


@PIPES
def test_training_keeps_its_own_end_without_a_reader() -> None:
    """Python's own: 120 where only its last flush fails."""
    code, error = run_unread("train.py", "--help", PYTHONUNBUFFERED="")
    assert code == 120
    assert "BrokenPipeError" in error


def test_another_broken_pipe_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(argv: list[str] | None) -> int:
        raise BrokenPipeError("a connection's")

    monkeypatch.setattr(kindling, "dispatch", broken)
    with pytest.raises(BrokenPipeError, match="a connection's"):
        kindling.main(["publish"])


@pytest.mark.parametrize(
    ("output", "code", "summary"),
    [
        ("x\n\x1b[32m\x1b[1m12 passed\x1b[0m\x1b[32m in 3.41s\x1b[0m\n", 0, "12 passed in 3.41s"),
        ("== 1 failed, 2 passed, 3 skipped in 61.20s (0:01:01) ==\n", 1,
         "1 failed, 2 passed, 3 skipped in 61.20s (0:01:01)"),
        ("5 passed in 1.0s\nFAILED a\n1 failed, 4 passed, 14 warnings in 2.00s\n", 1,
         "1 failed, 4 passed, 14 warnings in 2.00s"),
        ("no tests ran in 0.02s\n", 5,
         "0 passed, 1 failed: pytest ended with exit code 5 and no result"),
        ("Fatal Python error\n", -11,
         "0 passed, 1 failed: pytest ended with exit code -11 and no result"),
    ],
)  # fmt: skip
def test_summary_line(output: str, code: int, summary: str) -> None:
    assert check.summary_line(output, code=code) == summary


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 1), (5, 1)])
@pytest.mark.parametrize("step", ["ruff", "pyright", "pytest"])
def test_check_fails_if_any_step_fails(
    step: str,
    code: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    ran = []

    def run_shown(module: list[str]) -> tuple[int, str]:
        ran.append(module)
        return (code if module[0] == step else 0), "3 passed in 1.00s\n"

    monkeypatch.setattr(check, "run_shown", run_shown)
    monkeypatch.setattr(check, "enter_venv", lambda: None)
    assert check.main(["--quick", "tests/unit", "-k", "cli"]) == expected
    assert [module[0] for module in ran] == ["ruff", "ruff", "pyright", "pytest"]
    assert ran[-1][-5:] == ["-m", "not slow", "tests/unit", "-k", "cli"]
    assert " passed" in capsys.readouterr().out.splitlines()[-1]


@pytest.fixture
def venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished installation, as far as files tell, for setup_env to look at."""
    folder = tmp_path / ".venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.12.4\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("torch==1\n")
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "VENV", folder)
    for name, path in [("PYTHON", "bin/python"), ("STAMP", "stamp"), ("UNFINISHED", "unfinished")]:
        monkeypatch.setattr(setup_env, name, folder / path)
    setup_env.STAMP.write_text(setup_env.wanted_stamp())
    return folder


def test_a_finished_setup_is_ready(venv: Path) -> None:
    assert setup_env.is_ready()
    assert setup_env.venv_version() == "3.12.4"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("../pyproject.toml", "[project]\nname = 'x'\n"),
        ("../constraints.txt", "torch==2\n"),
        ("pyvenv.cfg", "version = 3.13.0\n"),
        ("stamp", ""),
        ("unfinished", ""),
    ],
)
def test_a_change_makes_the_setup_stale(venv: Path, file: str, text: str) -> None:
    (venv / file).write_text(text)
    assert not setup_env.is_ready()


def test_a_vanished_python_makes_the_setup_stale(venv: Path) -> None:
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to("/nowhere/python3")
    assert not setup_env.is_ready()
    assert "does not start" in setup_env.venv_fault()


def test_a_moved_or_half_installed_venv_is_faulty(venv: Path) -> None:
    setup_env.STAMP.write_text("hash\n/elsewhere/.venv\n")
    assert setup_env.venv_fault() == "was moved here from /elsewhere/.venv"
    setup_env.UNFINISHED.touch()
    assert setup_env.venv_fault() == "holds an interrupted installation"


def fake_python(folder: Path, *, version: str, code: int, stderr: str) -> str:
    """A program that answers the probe of `python_fault` as a Python of that version would."""
    path = folder / f"python{version}"
    path.write_text(f'#!/bin/sh\necho {version}\necho "{stderr}" >&2\nexit {code}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are shell scripts")
def test_no_usable_python_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fake_python(tmp_path, version="3.9", code=0, stderr="")
    missing = "ModuleNotFoundError: No module named 'ensurepip'"
    bare = fake_python(tmp_path, version="3.12", code=1, stderr=missing)
    monkeypatch.setattr(sys, "_base_executable", old)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup_env.SetupError) as caught:
        setup_env.find_python()
    message = str(caught.value)
    assert f"{old}: is Python 3.9, too old" in message
    assert f"{bare}: {missing}; on Debian and Ubuntu: sudo apt install python3.12-venv" in message
    good = fake_python(tmp_path, version="3.11", code=0, stderr="")
    assert setup_env.find_python() == good


def test_a_failing_pip_leaves_its_last_lines(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env, "run_shown", lambda command: (1, ["ERROR: No space left"]))
    with pytest.raises(setup_env.SetupError, match=r"exit code 1.*\n.*No space left"):
        setup_env.install()
    assert not setup_env.UNFINISHED.exists()


def test_an_interrupted_pip_leaves_its_mark(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(command: list[str]) -> tuple[int, list[str]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_env, "run_shown", interrupted)
    with pytest.raises(SystemExit) as caught:
        setup_env.prepare()
    assert caught.value.code == 130
    assert setup_env.UNFINISHED.exists()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (915.6 MB)",
         "downloading torch 2.13.0, 915.6 MB"),
        ("Using cached https://x.org/a/numpy-2.4.6-cp313-cp313-win.whl (17.0 MB)",
         "downloading numpy 2.4.6, 17.0 MB"),
        ("  Downloading zipp-4.1.2-py3-none-any.whl (10 kB)", ""),
        ("Installing collected packages: a, b, c", "installing 3 packages"),
        ("Requirement already satisfied: torch", ""),
    ],
)  # fmt: skip
def test_what_is_shown_of_pip(line: str, shown: str) -> None:
    assert setup_env.milestone(line) == shown


@pytest.mark.parametrize("name", ["setup_env", "check", "demo"])
def test_scripts_for_a_bare_python_parse_on_an_old_one(name: str) -> None:
    """An old python3 must get as far as the message that says so, or to a newer one."""
    path = ROOT / "scripts" / f"{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 8))
    lazily = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert lazily[0].module == "__future__", "else `X | None` in a signature would be computed"
