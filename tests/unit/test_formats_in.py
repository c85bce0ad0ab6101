"""Other tools' folders, read in place: CSV, kohya, ai-toolkit; and tables' further columns."""

import json
from pathlib import Path

import pytest

from data_tools import sources
from data_tools.sources import Draft, Fault, Note
from tests.unit import hostile
from tests.unit.folders import faults, survey
from train.errors import DataError


def drafts(root: Path) -> list[Draft]:
    _, gathered = sources.gather(root)
    assert gathered.faults == []
    return gathered.drafts


def fill(root: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        hostile.picture(root / name, seed=seed)


def sheet(root: Path, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    (root / "metadata.csv").write_bytes(data)


# ---- metadata.csv


def test_csv(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "小.png", "before/1.png", "before/2.png", "m.png")
    sheet(
        tmp_path,
        "\ufefffile_name,text,references,repeats,mask,mood\r\n"
        'a.png,"one, with a comma\nand ""quotes""",,,,\r\n'
        "\r\n"
        '小.png,第二,"[""before/2.png"", ""before/1.png""]", 3 ,m.png,calm\r\n',
    )
    assert drafts(tmp_path) == [
        Draft("a.png", 'one, with a comma and "quotes"', "metadata.csv:2"),
        Draft(
            "小.png",
            "第二",
            "metadata.csv:5",
            ("before/2.png", "before/1.png"),
            repeats=3,
            mask="m.png",
            extra={"mood": "calm"},
        ),
    ]
    found = survey(tmp_path)
    assert found.faults == ()
    unused = Note("m.png", "a mask, not used: data.mask is not 'files'")
    assert found.notes == (unused, Note("metadata.csv", "keys that are not read: mood"))
    assert [record.repeats for record in found.records] == [1, 3]


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        ("file_name;text\na.png;x\n", "", "columns are separated by ';'; save it with commas"),
        ("file_name\ttext\na.png\tx\n", "", r"columns are separated by '\t'; save it with commas"),
        (
            "name,text\na.png,x\n",
            "",
            "its first line must name the columns, file_name among them: ['name', 'text']",
        ),
        ("file_name,text,text\na.png,x,y\n", "", "key 'text' stands twice"),
        ("file_name,,text\na.png,x,y\n", "", "column 2 has no name"),
        (b"file_name,text\na.png,caf\xe9\n", "", "not UTF-8: byte 0xe9 at offset 24; save it as"),
        ("file_name,text\n".encode("utf-16"), "", "not UTF-8 but UTF-16; save it as UTF-8"),
        (" \n", "", "empty; write one line for each picture"),
        (
            "file_name,text\na.png,x, y\n",
            ":2",
            "3 columns instead of 2; put text with a comma in double quotes",
        ),
        ('file_name,text\n\na.png,"x\n', ":3", "broken CSV from here on: unexpected end of data"),
        (
            f"file_name,text\na.png,{'x' * 200_000}\n",
            ":2",
            "broken CSV from here on: field larger than field limit (131072)",
        ),
        ("file_name,text\n,x\n", ":2", "file_name is missing; the line has text"),
        ("file_name,text\nb.png,x\n", ":2", "no file 'b.png'; did you mean 'a.png'?"),
        ("file_name,text\n../a.png,x\n", ":2", "'../a.png' leads out of the folder; give names"),
        (
            "file_name,references\na.png,c.png\n",
            ":2",
            'references must be a JSON list like ["a.png", "b.png"]',
        ),
        (
            "file_name,repeats\na.png,many\n",
            ":2",
            'repeats must be a whole number from 1 to 1000, not "many"',
        ),
        ("file_name,mask\na.png,m.png\n", ":2", "no file 'm.png'"),
    ],
)
def test_a_bad_csv(tmp_path: Path, text: str | bytes, where: str, reason: str) -> None:
    fill(tmp_path, "a.png")
    sheet(tmp_path, text)
    [(path, said)] = faults(tmp_path)
    assert path == f"metadata.csv{where}"
    assert said.startswith(reason)


def test_two_tables(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    sheet(tmp_path, "file_name,text\na.png,x\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "y"}\n')
    assert faults(tmp_path) == [("metadata.csv", "beside a metadata.jsonl; keep one of the two")]


@pytest.mark.parametrize("repeats", [0, -1, 1.5, True, "2", 1001])
def test_unfit_repeats(tmp_path: Path, repeats: object) -> None:
    fill(tmp_path, "a.png")
    line = json.dumps({"file_name": "a.png", "text": "x", "repeats": repeats})
    (tmp_path / "metadata.jsonl").write_text(line)
    reason = f"repeats must be a whole number from 1 to 1000, not {json.dumps(repeats)}"
    assert faults(tmp_path) == [("metadata.jsonl:1", reason)]


def test_repeats_belong_to_the_digest(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    digests = []
    for repeats in (None, 1, 2):
        line = json.dumps({"file_name": "a.png", "text": "x", "repeats": repeats})
        (tmp_path / "metadata.jsonl").write_text(line)
        digests.append(survey(tmp_path).digest)
    assert digests[0] == digests[1] != digests[2]


# ---- kohya


def test_kohya_folders(tmp_path: Path) -> None:
    fill(tmp_path, "10_shs dog/a.png", "10_shs dog/b.png", "02_my_cat/sub/c.jpg", "0_off/d.png")
    (tmp_path / "10_shs dog/b.txt").write_text("b's own")
    (tmp_path / "02_my_cat/sub/c.caption").write_text("c's own")
    assert drafts(tmp_path) == [
        Draft("02_my_cat/sub/c.jpg", "c's own", "02_my_cat/sub/c.caption", repeats=2),
        Draft("10_shs dog/a.png", "shs dog", "10_shs dog", repeats=10),
        Draft("10_shs dog/b.png", "b's own", "10_shs dog/b.txt", repeats=10),
    ]
    found = survey(tmp_path)
    assert found.notes == (
        Note("0_off", "not used: kohya's folder with 0 repeats"),
        Note("02_my_cat", "kohya's folder: 2 repeats, caption 'my_cat' where there is none"),
        Note("10_shs dog", "kohya's folder: 10 repeats, caption 'shs dog' where there is none"),
    )
    assert [record.repeats for record in found.records] == [2, 10, 10]


@pytest.mark.parametrize(
    "others", ["b.png", "plain/b.png", "2024_paris/b.png", "10/b.png", "x10_a/b.png"]
)
def test_not_kohya_if_pictures_lie_elsewhere(tmp_path: Path, others: str) -> None:
    fill(tmp_path, "10_dog/a.png", others)
    _, found = sources.gather(tmp_path)
    assert {(draft.repeats, draft.caption) for draft in found.drafts} == {(1, "")}
    text = "read as an ordinary folder, not kohya's, as pictures lie outside such folders"
    assert found.notes == [Note("10_dog", text)]


def test_a_trigger_missing_in_kohyas_name(tmp_path: Path) -> None:
    fill(tmp_path, "3_dog/a.png")
    assert faults(tmp_path, trigger="shs") == [("3_dog", "the caption lacks the trigger 'shs'")]


# ---- ai-toolkit


def test_ai_toolkit(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.txt").write_text("[trigger] runs past [trigger]")
    (tmp_path / "b.json").write_text('{"caption": "photo of\\n[trigger]", "caption_short": "x"}')
    (tmp_path / "c.txt").write_text("ohwx sits")
    (tmp_path / "c.json").write_text('{"width": 3}')
    found = survey(tmp_path, trigger="ohwx")
    assert [r.caption for r in found.records] == [
        "ohwx runs past ohwx",
        "photo of ohwx",
        "ohwx sits",
    ]
    assert found.faults == ()
    assert found.notes == (Note("c.json", "not read: it has no key 'caption'"),)
    missing = "the caption has [trigger], but data.trigger is not set"
    assert faults(tmp_path) == [("a.txt", missing), ("b.json", missing)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"caption": ', "broken JSON: Expecting value, column 13"),
        ("[1]", "a line must be an object like"),
        ('{"caption": 3}', "the caption must be text, not 3"),
        ('{"caption": "a", "caption": "b"}', "key 'caption' stands twice"),
        ("[" * 90_000, "broken JSON: nested too deep"),
        ('{"caption": "x", "n": ' + "9" * 9000 + "}", "broken JSON: a number too long"),
    ],
)
def test_a_bad_json_caption(tmp_path: Path, text: str, reason: str) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "a.json").write_text(text)
    [(path, said)] = faults(tmp_path)
    assert path == "a.json"
    assert said.startswith(reason)


def test_two_kinds_of_caption_for_one_picture(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.json").write_text('{"caption": "y"}')
    claim = "captions a.png; give each picture one caption file of its own"
    assert faults(tmp_path) == [("a.json and a.txt", claim)]


# ---- what has to be imported first


def test_containers_get_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train-0.parquet").touch()
    (tmp_path / "my pictures.tar.gz").touch()
    monkeypatch.chdir(tmp_path)
    cases = {
        "set": "set: no pictures, but .parquet files; run `kindling import set set-pictures` first",
        "my pictures.tar.gz": "my pictures.tar.gz: a file, but data.path must be a folder of "
        "pictures; run `kindling import 'my pictures.tar.gz' 'my pictures-pictures'` first",
        "org/cats": "org/cats: no such folder; if it is a data set on the Hugging Face hub, "
        "run `kindling import hf:org/cats cats-pictures` first",
    }
    for name, said in cases.items():
        with pytest.raises(DataError) as caught:
            survey(Path(name))
        assert str(caught.value) == said


def test_a_container_beside_pictures_is_noted(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.parquet").touch()
    [note] = survey(tmp_path).notes
    assert note.path == "b.parquet"
    assert note.text.startswith("not read: run `kindling import ")


def test_the_mask_is_no_picture_of_its_own(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "m.png")
    line = json.dumps({"file_name": "a.png", "text": "x", "mask": "m.png"})
    (tmp_path / "metadata.jsonl").write_text(line)
    found = survey(tmp_path, mask="files")
    assert (found.faults, found.notes) == ((), ())
    assert [row.mask for row in found.records] == [tmp_path / "m.png"]


def test_a_mask_that_leads_out(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    line = json.dumps({"file_name": "a.png", "text": "x", "mask": "/etc/passwd"})
    (tmp_path / "metadata.jsonl").write_text(line)
    reason = "'/etc/passwd' leads out of the folder; give names relative to it"
    assert survey(tmp_path).faults == (Fault("metadata.jsonl:1", reason),)


# ---- references beside pictures


def test_references_beside_their_picture(tmp_path: Path) -> None:
    names = ("a.png", "a.ref.png", "b.png", "b.ref10.jpg", "b.ref2.png", "sub/c.png", "c.ref.png")
    fill(tmp_path, *names)
    for name in ("a", "b", "sub/c", "c.ref"):
        (tmp_path / f"{name}.txt").write_text("make it red", encoding="utf-8")
    found = {draft.name: draft.references for draft in drafts(tmp_path)}
    assert found == {
        "a.png": ("a.ref.png",),
        "b.png": ("b.ref2.png", "b.ref10.jpg"),
        "c.ref.png": (),
        "sub/c.png": (),
    }
    alone = "has no reference, as others here have; trained as a picture of its own"
    assert survey(tmp_path).notes == (("c.ref.png", alone), ("sub/c.png", alone))
