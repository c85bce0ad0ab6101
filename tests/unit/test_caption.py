"""`kindling caption` as a user runs it."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_tools import records
from data_tools.caption import command as caption
from data_tools.caption import instructions, journal
from data_tools.caption.captioners.filename import words
from data_tools.caption.captioners.server import KEY_VARIABLE
from tests import tiny_vision
from tests.caption_server import CaptionServer, Reply, Request, completion, serve
from tests.runs import ROOT
from train.config import DataConfig

SHADES = [(50 * number, 0, 100) for number in range(6)]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six plain pictures, shade 0 to 5."""
    top = tmp_path / "pictures"
    top.mkdir()
    for number, shade in enumerate(SHADES):
        Image.new("RGB", (64, 48), shade).save(top / f"{number}.png")
    return top


def shade_of(request: Request) -> int:
    return SHADES.index(request.colours[-1])


def plain(request: Request, _: int = 0) -> Reply:
    return completion(f"Zibby stands in shade {shade_of(request)}.")


def run(target: CaptionServer, root: Path, *more: str) -> int:
    """Caption by the server, one request at a time."""
    spec = f"http:{target.url}"
    fixed = ["--for", "character", "--trigger", "zibby", "--concurrency", "1", "--retries", "1"]
    given = [] if "--for" in more else fixed
    return caption.main([str(root), "--captioner", spec, *given, *more])


def rows(path: Path) -> dict[str, Any]:
    """The lines of a metadata.jsonl, by file name."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row.pop("file_name"): row for row in found}


def trained(root: Path) -> dict[str, str]:
    """The captions that training would read."""
    data = DataConfig(path=str(root), resolution=64)
    return {record.name: record.caption for record in records.read(data).records}


def snapshot(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if path.name[0] != "."}


# ---- what is written


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


def test_replace_keeps_the_old_ones(root: Path) -> None:
    (root / "1.txt").write_text("mine\n")
    with serve(plain) as target:
        for _ in range(2):  # once more changes nothing
            assert run(target, root, "--write", "sidecars", "--replace") == 0
        assert len(target.requests) == 6
    assert (root / "1.txt").read_text() == "zibby stands in shade 1.\n"
    assert (root / "1.txt.bak").read_text() == "mine\n"
    assert len(list(root.glob("*.bak*"))) == 1


def test_an_older_backup_stays(root: Path) -> None:
    (root / "1.txt").write_text("second\n")
    (root / "1.txt.bak").write_text("first\n")
    with serve(plain) as target:
        assert run(target, root, "--write", "sidecars", "--replace") == 0
    kept = [(root / f"1.txt.{name}").read_text() for name in ("bak", "bak2")]
    assert kept == ["first\n", "second\n"]


def test_metadata_is_filled_in(root: Path, capsys: pytest.CaptureFixture) -> None:
    old = (
        '{"file_name": "0.png", "caption": "", "score": 3}\n\n'
        '{"text": "mine", "file_name": "1.png", "mood": "小.png"}'
    )
    (root / "metadata.jsonl").write_text(old, encoding="utf-8")
    with serve(plain) as target:
        assert run(target, root) == 0
    assert rows(root / "metadata.jsonl") == {
        "0.png": {"caption": "zibby stands in shade 0.", "score": 3},
        "1.png": {"text": "mine", "mood": "小.png"},
    }
    assert (root / "metadata.jsonl.bak").read_text(encoding="utf-8") == old
    output = capsys.readouterr().out
    assert f"what it held before is in {root}/metadata.jsonl.bak" in output
    assert "left alone (--add-unlisted takes them in): 2.png, 3.png, 4.png, 5.png" in output


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


# ---- what is asked


def test_a_character_is_named_and_its_traits_are_left_out(root: Path) -> None:
    with serve(plain) as target:
        assert run(target, root, "--constant", "red scarf, {one} eye", "--limit", "1") == 0
    words = target.requests[0].words
    assert "Call the character zibby" in words
    assert "never mention them: red scarf, {one} eye" in words
    assert words.endswith("The picture:")


def test_pictures_are_shrunk(root: Path) -> None:
    Image.new("RGB", (900, 300), SHADES[0]).save(root / "0.png")
    seen = []

    def answer(request: Request, _: int) -> Reply:
        url = request.body["messages"][1]["content"][-1]["image_url"]["url"]
        assert url.startswith("data:image/jpeg;base64,")
        seen.append(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size)
        return plain(request)

    with serve(answer) as target:
        assert run(target, root, "--longest-side", "300", "--limit", "2") == 0
    assert seen == [(300, 100), (64, 48)]


def test_edits(root: Path, capsys: pytest.CaptureFixture) -> None:
    lines = [
        {"file_name": "2.png", "references": ["0.png", "1.png"]},
        {"file_name": "3.png", "references": ["1.png"], "text": "Keep me"},
        {"file_name": "4.png"},
    ]
    text = "\n".join(map(json.dumps, lines))
    (root / "metadata.jsonl").write_text(text)
    with serve(lambda *_: completion("Make it brighter.")) as target:
        assert run(target, root, "--for", "edit", "--concurrency", "1") == 2
    (request,) = target.requests
    assert request.colours == [SHADES[0], SHADES[1], SHADES[2]]
    parts = [part.get("text") for part in request.body["messages"][1]["content"]]
    assert parts[0].startswith("What was changed from the reference to the target?")
    assert parts[0].endswith("Reference picture 1:")
    assert parts[1:] == [None, "Reference picture 2:", None, "Target picture:", None]
    assert rows(root / "metadata.jsonl")["2.png"] == {
        "references": ["0.png", "1.png"],
        "text": "Make it brighter.",
    }
    assert "4.png: no references to compare with" in capsys.readouterr().out


def test_own_words(root: Path, tmp_path: Path) -> None:
    (tmp_path / "task.txt").write_text("Describe the {light}.", encoding="utf-8")
    with serve(plain) as target:
        run(target, root, "--instruction", str(tmp_path / "task.txt"), "--limit", "1")
    assert target.requests[0].words.startswith("Describe the {light}.")


@pytest.mark.parametrize("language", instructions.LANGUAGES)
@pytest.mark.parametrize("purpose", instructions.PURPOSES)
def test_every_instruction_is_complete(language: str, purpose: str) -> None:
    named = purpose in instructions.NAMED
    found = set()
    for traits in ("out", "in"):
        for constant in ("", "one eye") if named else ("",):
            made = instructions.build(
                purpose, language=language, trigger="zibby", traits=traits, constant=constant
            )
            words = made.system + made.task
            assert "{" not in words
            assert ("zibby" in words) == named
            assert ("one eye" in words) == bool(constant)
            chinese = sum("\u3400" <= character <= "\u9fff" for character in words)
            assert (chinese > 100) == (language == "zh")
            found.add(made.digest)
    assert len(found) == (4 if named else 1)


def test_chinese(root: Path) -> None:
    with serve(lambda *_: completion("说明：“一只狐狸。”")) as target:
        more = ("--for", "style", "--language", "zh", "--trigger", "水墨风", "--limit", "1")
        assert run(target, root, *more) == 0
    assert "绝不写风格" in target.requests[0].words
    row = rows(root / "metadata.jsonl")["0.png"]
    assert row["text"] == "水墨风, 一只狐狸。"


# ---- what is no caption


def test_what_is_no_caption_is_listed_and_not_written(
    root: Path, capsys: pytest.CaptureFixture
) -> None:
    replies = [
        completion("Zibby waves."),
        completion("I can't help with that."),
        completion("  "),
        completion("zibby waves and " * 20),
        completion("zibby wav", reason="length"),
        Reply(b"<html>"),
    ]
    with serve(lambda request, _: replies[shade_of(request)]) as target:
        assert run(target, root) == 2
    assert [name for name, row in rows(root / "metadata.jsonl").items() if "text" in row] == [
        "0.png"
    ]
    output = capsys.readouterr().out
    assert output[output.index("Not captioned") :] == (
        "Not captioned (5; the same command tries these again):\n"
        """  1.png: refused: "I can't help with that."\n"""
        "  2.png: an empty answer\n"
        "  3.png: repeats itself: 'zibby waves and'\n"
        "  4.png: cut off at the token limit; raise --max-tokens\n"
        "  5.png: the server failed 2 times; at last: a web page instead of JSON; is the URL an "
        "API's?\n"
    )


def test_what_failed_is_asked_again_the_next_time(root: Path) -> None:
    with serve(lambda request, _: plain(request) if shade_of(request) else Reply({})) as target:
        assert run(target, root) == 2
    with serve(plain) as target:
        assert run(target, root) == 0
        assert [shade_of(request) for request in target.requests] == [0]
    assert len(trained(root)) == 6


def test_pictures_that_cant_be_used(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / "0.png").write_bytes((root / "0.png").read_bytes()[:60])
    Image.new("RGB", (900, 9)).save(root / "1.png")
    (root / "2.png").unlink()
    os.mkfifo(root / "2.png")
    (root / "3.txt").write_bytes(b"\xff\xfe\x00")
    with serve(plain) as target:
        assert run(target, root) == 2
    output = capsys.readouterr().out
    for line in (
        "0.png: damaged or cut off",
        "1.png: too small or too narrow to see anything in it (900x9)",
        "2.png: can't be opened (2.png is not a regular file)",
        "3.txt: not UTF-8",
    ):
        assert line in output
    assert set(rows(root / "metadata.jsonl")) == {f"{number}.png" for number in (0, 1, 2, 4, 5)}


def test_pictures_that_would_share_a_sidecar(root: Path, capsys: pytest.CaptureFixture) -> None:
    Image.new("RGB", (64, 48), SHADES[0]).save(root / "1.jpg")
    with serve(plain) as target:
        assert run(target, root, "--write", "sidecars") == 2
    assert "1.jpg: another picture would share 1.txt; rename one" in capsys.readouterr().out
    assert sorted(path.stem for path in root.glob("*.txt")) == ["0", "2", "3", "4", "5"]


def test_if_nothing_works_it_stops(root: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(40):
        Image.new("RGB", (64, 48), SHADES[number % 6]).save(root / f"x{number}.png")
    with serve(lambda *_: completion("")) as target:
        assert run(target, root) == 2
        assert len(target.requests) == 20
    assert "not one caption after 20 pictures; the rest wasn't asked" in capsys.readouterr().err


# ---- going on


def command(target: CaptionServer, root: Path, *more: str) -> list[str]:
    arguments = [str(root), "--captioner", target.url, "--concurrency", "1", "--timeout", "60"]
    words = ["--for", "character", "--trigger", "zibby"]
    return [sys.executable, "-m", "scripts.kindling", "caption", *arguments, *words, *more]


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


def test_a_server_that_dies_leaves_what_was_done(root: Path, capsys: pytest.CaptureFixture) -> None:
    dead = Reply({"error": "quota used up"}, status=402)
    with serve(lambda request, _: dead if shade_of(request) == 3 else plain(request)) as target:
        assert run(target, root) == 2
    error = capsys.readouterr().err
    assert "3 of 6 captions are finished and kept; the same command goes on from there" in error
    assert "status 402 (quota used up)" in error
    kept = (root / journal.NAME).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["name"] for line in kept] == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        (lambda root: None, 0),
        (lambda root: (root / "0.png").rename(root / "new.png"), 0),
        (lambda root: Image.new("RGB", (64, 50), SHADES[0]).save(root / "0.png"), 1),
        (lambda root: ["--constant", "one eye"], 6),
        (lambda root: ["--longest-side", "40"], 6),
        (lambda root: ["--model", "other"], 6),
        (lambda root: ["--timeout", "50"], 0),
    ],
)
def test_the_journal_is_for_the_same_question_only(
    root: Path, change: Callable[[Path], Any], asked: int
) -> None:
    with serve(plain) as target:
        assert run(target, root) == 0
        (root / "metadata.jsonl").unlink()
        more = change(root)
        before = len(target.requests)
        assert run(target, root, *(more if isinstance(more, list) else [])) == 0
        assert len(target.requests) - before == asked


def test_a_torn_journal_is_used_as_far_as_it_goes(root: Path) -> None:
    path = root / journal.NAME
    with serve(plain) as target:
        run(target, root)
        (root / "metadata.jsonl").unlink()
        path.write_bytes(path.read_bytes()[:-20])
        assert run(target, root) == 0
        assert len(target.requests) == 7
        (root / "metadata.jsonl").unlink()
        assert run(target, root) == 0
        assert len(target.requests) == 7


def test_a_folder_that_cant_be_written(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / journal.NAME).mkdir()  # root may write into any folder, but not into this
    with serve(plain) as target:
        assert run(target, root) == 2
        assert not target.requests
    assert "write elsewhere with --output" in capsys.readouterr().err


# ---- other captioners


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("red-fox_in  snow (3).jpg", "red fox in snow"),
        ("sub/01-pink.png", "pink"),
        ("a.b.c 2024 12.png", "a b c"),
        ("3 foxes 3d.png", "foxes 3d"),
        ("小狐狸_02.webp", "小狐狸"),
        ("IMG_0001.jpg", ""),
        ("DSC-12.jpg", ""),
        ("12_34.png", ""),
        ("___.png", ""),
    ],
)
def test_words_of_a_file_name(name: str, text: str) -> None:
    assert words(name) == text


def test_filename(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("red_fox-1", "IMG_2", "zibby runs"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    argv = [str(tmp_path), "--captioner", "filename", "--trigger", "zibby"]
    assert caption.main([*argv, "--write", "sidecars"]) == 2
    found = {path.stem: path.read_text() for path in tmp_path.glob("*.txt")}
    assert found == {"red_fox-1": "zibby, red fox\n", "zibby runs": "zibby runs\n"}
    output = capsys.readouterr().out
    assert "1 lacked 'zibby' and got it put in front" in output
    assert "IMG_2.png: the file name has no words" in output


@pytest.mark.parametrize("kind", ["base", "hf"])
def test_a_local_model(
    root: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_tools.caption.captioners import models

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
    assert caption.main([*argv, "--batch-size", "4"]) == 0
    assert trained(root)["5.png"] == "a fox, shade 5"


# ---- what can't be meant


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--captioner", "gpt"], "there is no captioner 'gpt'; there are base, hf:MODEL"),
        (["--captioner", "hf"], "there is no captioner 'hf'"),
        (["--captioner", "base:x"], "there is no captioner 'base:x'"),
        (["--captioner", "base"], "say what the captions are for: --for style|character"),
        (["--captioner", "base", "--for", "character"], "--for character needs --trigger"),
        (["--captioner", "base", "--for", "style", "--traits", "in"], "--traits is for --for char"),
        (["--captioner", "base", "--for", "style", "--constant", "x"], "--constant is for char"),
        (["--captioner", "filename", "--quantize", "4bit"], "--quantize is for base and hf"),
        (
            ["--captioner", "hf:x", "--for", "style", "--base", "y"],
            "--base is for base, not for hf",
        ),
        (["--captioner", "filename", "--output", "x.txt"], "--output must be a .jsonl file"),
        (["--captioner", "filename", "--output", "no/x.jsonl"], "there is no folder no"),
        (
            ["--captioner", "filename", "--write", "sidecars", "--output", "x.jsonl"],
            "--output is for --write metadata",
        ),
        (
            ["--captioner", "base", "--for", "style", "--instruction", "no.txt"],
            "--instruction no.txt: can't be read",
        ),
    ],
)
def test_wrong_options(
    root: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    before = snapshot(root)
    assert caption.main([str(root), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert snapshot(root) == before
    assert not list(root.glob(".*"))


def test_sidecars_beside_a_metadata_file(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / "metadata.jsonl").write_text('{"file_name": "1.png"}\n')
    assert caption.main([str(root), "--captioner", "filename", "--write", "sidecars"]) == 2
    assert "with it .txt files are not read" in capsys.readouterr().err


def test_a_broken_metadata_file_is_not_rewritten(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / "metadata.jsonl").write_text('{"file_name": "1.png"}\n{"file_na\n')
    assert caption.main([str(root), "--captioner", "filename"]) == 2
    assert "metadata.jsonl:2: broken JSON" in capsys.readouterr().err


def test_nothing_to_do(root: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(6):
        (root / f"{number}.txt").write_text("mine")
    before = snapshot(root)
    assert caption.main([str(root), "--captioner", "base", "--for", "style"]) == 0
    assert "nothing to do; --replace would caption them anew" in capsys.readouterr().out
    assert snapshot(root) == before


def test_no_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert caption.main([str(tmp_path), "--captioner", "filename"]) == 2
    assert "no pictures" in capsys.readouterr().err


def test_help_and_options_come_without_torch() -> None:
    code = (
        "import sys\nfrom data_tools.caption import command\n"
        "try:\n    command.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'transformers', 'httpx', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stderr


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
