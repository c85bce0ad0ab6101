"""Tar files: foreign ones are read, hostile ones refused."""

import os
import tarfile
from pathlib import Path

import pytest

from data_tools.exchange import import_data, samples
from data_tools.sources import Draft
from tests.unit.exchange.data_sets import GOOD, contents, cut, drafts, fails, png, tar


def test_a_foreign_tar(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "x.tar.gz",
        ("./d/0001.JPG", png(1)),
        ("./d/0001.txt", b"a\ncat\n"),
        ("d/0001.pkl", b"cos\nsystem\n(S'touch pwned'\ntR."),
        ("d/._0001.txt", b"apple"),
        ("0002.json", b'{"caption": "dog", "repeats": 2, "score": 5}'),
        ("0002.png", png(2)),
        ("0003.png", png(3)),
        ("0003.ref0.png", png(4)),
        ("0003.mask.png", png(5)),
        ("0003.txt", b"edit"),
    )
    count, notes = import_data.run(str(path), tmp_path / "out")
    assert (count, notes) == (3, ["not carried over: pkl"])
    assert drafts(tmp_path / "out") == [
        Draft("0002.png", "dog", "", repeats=2, extra={"score": 5}),
        Draft("0003.png", "edit", "", ("0003-ref0.png",), mask="0003-mask.png"),
        Draft("d/0001.jpg", "a cat", ""),
    ]
    assert contents(tmp_path / "out")["0003-ref0.png"] == png(4)


# ---- hostile ones


def member(kind: bytes, name: str, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


LINK = "is a link; a tar must hold the files themselves"


TARS: list[tuple[list, str]] = [
    ([("../up.png", png()), ("../up.txt", b"x")], "'../up.png' leads out of the folder"),
    ([("/tmp/abs.png", png())], "'/tmp/abs.png' leads out of the folder"),
    ([("a/../../b.png", png())], "'a/../../b.png' leads out of the folder"),
    ([("C:/x.png", png())], "'C:/x.png' leads out of the folder"),
    ([("a\\b.png", png())], "has a backslash or a control character in it"),
    ([("a\nb.png", png())], "has a backslash or a control character in it"),
    ([(".git/a.png", png())], "is a hidden file's name"),
    ([(f"{'x' * 300}.png", png())], "is too long a name"),
    ([member(tarfile.SYMTYPE, "s.png", "/etc/passwd")], f"'s.png' {LINK}"),
    ([member(tarfile.LNKTYPE, "h.png", "good.png")], f"'h.png' {LINK}"),
    ([member(tarfile.CHRTYPE, "c.png")], "'c.png' is a device or pipe, not a file"),
    ([member(tarfile.FIFOTYPE, "f.png")], "'f.png' is a device or pipe, not a file"),
    ([("d.png", png(1)), ("d.png", png(2))], "two fields 'png'"),
    ([("k.png", png()), ("l.png", png()), ("k.txt", b"x")], "k: this key was there already"),
    ([("e.png", b"")], "the field 'png' is missing or empty"),
    ([("t.txt", b"only text")], "no picture; its fields are txt"),
    ([("m.png", png()), ("m.jpg", png())], "several pictures (png, jpg); name the one to train"),
    ([("j.png", png()), ("j.json", b"{")], "its json: broken JSON"),
    ([("j.png", png()), ("j.json", b'{"text": 5}')], "the caption must be text, not 5"),
    ([("j.png", png()), ("j.json", b'{"file_name": "../x.png"}')], "'../x.png' leads out"),
    (
        [("j.png", png()), ("j.json", b'{"file_name": "metadata.jsonl"}')],
        "'metadata.jsonl' isn't a picture's file name",
    ),
    ([("j.png", png()), ("j.json", b'{"file_name": "good.png"}')], "'good.png' was there already"),
    ([("u.png", png()), ("u.txt", b"caf\xe9")], "not UTF-8: byte 0xe9 at offset 3"),
    (
        [("j.png", png()), ("j.ref0.png", png(1)),
         ("j.json", b'{"file_name": "n.png", "references": ["good.png"]}')],
        "'good.png' was there already, as another picture",
    ),
    (
        [("j.png", png()), ("j.json", b'{"file_name": "good.png/n.png"}')],
        "'good.png/n.png' is a file here and a folder there",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("members", "reason"), TARS)
def test_a_hostile_tar(tmp_path: Path, members: list, reason: str) -> None:
    path = tar(tmp_path / "x.tar", *GOOD, *members)
    said = fails(path, tmp_path / "out" / "set")
    title, *lines = said.splitlines()
    assert title == f"{path}: these can't be imported; --skip-bad leaves them out:"
    assert len(lines) == 1
    assert reason in lines[0]
    count, [note, *_] = import_data.run(str(path), tmp_path / "out" / "set", skip_bad=True)
    assert count == 1 + ("l.png" in str(members)) + ("k.txt" in str(members))
    assert reason in note
    inside = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert all(name.parts[0] == "out" or name == Path("x.tar") for name in inside)
    assert contents(tmp_path / "out" / "set")["good.png"] == png(9)


def test_a_tar_that_is_cut_off(tmp_path: Path) -> None:
    big = os.urandom(20_000)
    for kind, size in [("x.tar", 600), ("x.tar", 2048), ("x.tar", 5000), ("x.tar.gz", 9000)]:
        path = cut(tar(tmp_path / kind, ("a.png", png()), ("b.png", big)), size)
        said = fails(path, tmp_path / "out")
        assert said.startswith(f"{path}: damaged or cut off"), (kind, size)
        assert said.endswith("get it again")
        samples.discard(tmp_path / "out.part")
    spoiled = tar(tmp_path / "y.tar", ("a.png", png()), ("b.png", png()))
    data = bytearray(spoiled.read_bytes())
    data[1024 + 20] ^= 0xFF  # in the second header, which tarfile alone takes for the end
    spoiled.write_bytes(data)
    assert "damaged or cut off behind 'a' (bad checksum)" in fails(spoiled, tmp_path / "out")
    (tmp_path / "z.tar").write_bytes(b"no tar" * 1000)
    assert "z.tar: damaged or cut off" in fails(tmp_path / "z.tar", tmp_path / "out2")
