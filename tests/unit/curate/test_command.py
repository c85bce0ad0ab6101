"""Versions: what is in them, and that the same choice is the same bytes."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from data_tools import sources
from data_tools.curate import command as curate
from data_tools.curate import recipe
from scripts import kindling
from tests.unit.curate.studio import entries, files, made, rows, rules, scene, studio
from train.errors import DataError


def test_a_version(tmp_path: Path) -> None:
    studio(tmp_path / "in")
    before = files(tmp_path / "in")
    exclude = {"names": ["hero/7.png"], "match": ["draft/*"], "captions": ["(?i)watermark"]}
    exclude |= {"min_side": 50, "near_duplicates": True}
    concepts = [{"name": "hero", "match": "hero/*"}, {"name": "world", "match": "*"}]
    recipe = rules(
        tmp_path,
        exclude=exclude,
        concepts=concepts,
        balance=True,
        validation={"fraction": 0.3},
        crop=[{"match": "world/*", "to": "centre", "aspect": "1:1"}],
    )
    version, plan = curate.run(recipe)
    assert version.name.startswith("v1-")
    listed = entries(version)
    assert {name: row["excluded"] for name, row in listed.items() if "excluded" in row} == {
        "hero/7.png": ["by name"],
        "draft/9.png": ["matches 'draft/*'"],
        "world/10.png": ["caption has '(?i)watermark'"],
        "world/11.png": ["60x40 is below min_side 50"],
        "hero/0.png": ["near-duplicate of hero/0-again.jpg (0 of 64 bits differ)"],
    }
    train, held = rows(version / "train"), rows(version / "validation")
    assert len(held) == 2
    assert all(name.startswith("hero/") for name in held)
    assert {row["repeats"] for name, row in train.items() if name.startswith("world")} == {5}
    assert len(train) == 6
    assert Image.open(version / "train/world/12.png.crop.png").size == (64, 64)
    assert listed["world/12.png"]["crop"] == [16, 0, 80, 64]
    for name, row in listed.items():
        if "file" in row and "crop" not in row:
            assert (version / row["file"]).read_bytes() == before[name]
    assert files(tmp_path / "in") == before
    assert sources.gather(version / "train")[1].faults == []
    assert plan is not None
    assert curate.text(plan).splitlines()[:3] == [
        "13 pictures: 6 to train, 2 held out, 5 left out",
        "  hero: 5 showings an epoch of 5, 2 held out",
        "  world: 5 showings an epoch of 1, 0 held out",
    ]


def test_twice_is_once_and_elsewhere_is_the_same(tmp_path: Path) -> None:
    studio(tmp_path / "in")
    recipe = rules(tmp_path, validation={"fraction": 0.2})
    version = made(recipe)
    first = files(version)
    assert curate.run(recipe) == (version, None)
    assert files(version) == first
    elsewhere = made(recipe.model_copy(update={"output": str(tmp_path / "other")}))
    assert elsewhere.name == version.name
    second = files(elsewhere)
    for listed in (first, second):
        del listed["recipe.yaml"]  # it has the output's place
    assert second == first
    assert [p.name for p in (tmp_path / "out").iterdir()] == [version.name]


def test_changes_give_a_new_version(tmp_path: Path) -> None:
    studio(tmp_path / "in")
    recipe = rules(tmp_path)
    versions = [made(recipe)]
    first = files(versions[0])
    scene(tmp_path / "in/hero/20.png", seed=20)
    versions.append(made(recipe))
    (tmp_path / "in/hero/20.txt").write_text("another caption")
    versions.append(made(recipe))
    versions.append(made(rules(tmp_path, exclude={"min_side": 50})))
    assert [path.name[:3] for path in versions] == ["v1-", "v2-", "v3-", "v4-"]
    assert files(versions[0]) == first
    (tmp_path / "in/hero/20.png").unlink()
    (tmp_path / "in/hero/20.txt").unlink()
    assert curate.run(recipe) == (versions[0], None)


def test_a_version_that_was_changed_is_not_taken(tmp_path: Path) -> None:
    studio(tmp_path / "in")
    recipe = rules(tmp_path)
    version = made(recipe)
    (version / "train/hero/1.png").write_bytes(b"x")
    (version / "train/new.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        curate.run(recipe)
    title, *lines = str(caught.value).splitlines()
    assert title == f"{version}: changed since it was made; remove it to have it made again:"
    assert lines == ["  train/hero/1.png", "  train/new.txt"]


def test_a_killed_run_leaves_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studio(tmp_path / "in")
    recipe = rules(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            curate, "_write_manifest", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            curate.run(recipe)
    assert list((tmp_path / "out").glob("v*")) == []
    version = made(recipe)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [version.name]


def test_references_and_masks_go_along(tmp_path: Path) -> None:
    for seed, name in enumerate(["a.png", "b.png", "before.png", "m.png"]):
        scene(tmp_path / "in" / name, seed=seed).with_suffix(".txt").unlink()
    lines = [
        {"file_name": "a.png", "text": "x", "references": ["before.png"], "mood": 1},
        {"file_name": "b.png", "text": "y", "references": ["before.png"], "mask": "m.png"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "in/metadata.jsonl").write_text(text)
    version = made(rules(tmp_path))
    assert (version / "train/metadata.jsonl").read_text() == text
    listed = {n: d for n, d in files(version / "train").items() if n.endswith(".png")}
    assert listed == {n: d for n, d in files(tmp_path / "in").items() if n.endswith(".png")}
    crop = [{"match": "*", "to": "centre", "aspect": "1:1"}]
    with pytest.raises(DataError) as caught:
        made(rules(tmp_path, crop=crop))
    assert "a.png: has references, which a crop would tear away from it" in str(caught.value)
    # a changed reference is another data set, though its name and the captions are the same
    scene(tmp_path / "in/before.png", seed=77).with_suffix(".txt").unlink()
    assert made(rules(tmp_path)) != version


def test_links(tmp_path: Path) -> None:
    studio(tmp_path / "in")
    version = made(rules(tmp_path), link=True)
    assert os.path.samefile(version / "train/hero/1.png", tmp_path / "in/hero/1.png")
    assert curate.run(rules(tmp_path)) == (version, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"exclude": {"names": ["hero/00.png", "x"]}},
            "exclude.names: not among the pictures:\n"
            "  hero/00.png; did you mean 'hero/0.png'?\n  x",
        ),
        ({"exclude": {"match": ["*"]}}, "exclude: no picture is left:\n  draft/9.png: matches '*'"),
        (
            {"crop": [{"match": "hero/1.png", "to": "box", "box": [0, 0, 98, 9]}]},
            "crop: these can't be cropped; change the patterns:\n"
            "  hero/1.png: the box 0, 0, 98, 9 leads out of its 97x64 pixels",
        ),
    ],
)
def test_what_cannot_be_done(tmp_path: Path, changes: dict, said: str) -> None:
    studio(tmp_path / "in")
    with pytest.raises(DataError) as caught:
        curate.run(rules(tmp_path, **changes))
    assert str(caught.value).startswith(said)
    assert not list((tmp_path / "out").glob("*"))


def test_bad_pictures(tmp_path: Path) -> None:
    studio(tmp_path / "in")
    (tmp_path / "in/hero/3.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"set exclude\.bad_pictures:\n  hero/3\.png: empty file"):
        curate.run(rules(tmp_path))
    version = made(rules(tmp_path, exclude={"bad_pictures": True}))
    reason = "empty file (0 bytes); get it again or remove it"
    assert entries(version)["hero/3.png"]["excluded"] == [reason]


def test_the_output_may_not_lie_in_the_source(tmp_path: Path) -> None:
    studio(tmp_path / "in")
    with pytest.raises(DataError, match="lies in the source"):
        curate.run(rules(tmp_path, output=str(tmp_path / "in/out")))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    studio(tmp_path / "in")
    path = tmp_path / "recipe.yaml"
    path.write_text(f"source: {tmp_path}/in\noutput: {tmp_path}/out\nexclude: {{match: [zz*]}}\n")
    assert kindling.main(["curate", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "exclude.match: 'zz*' matches no picture" in said
    assert "Sharpness, from the lowest" in said
    assert not (tmp_path / "out").exists()
    assert kindling.main(["curate", str(path)]) == 0
    [version] = (tmp_path / "out").iterdir()
    assert capsys.readouterr().out.splitlines()[-1] == str(version)
    assert kindling.main(["curate", str(path)]) == 0
    assert capsys.readouterr().out == f"{version}: is this recipe on these pictures already\n"
    path.write_text("source: nowhere\noutput: x\n")
    assert kindling.main(["curate", str(path)]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    again = recipe.load(version / "recipe.yaml")
    assert curate.run(again) == (version, None)
