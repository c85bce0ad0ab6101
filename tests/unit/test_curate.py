"""Recipes: what they refuse, what they choose, and that the same choice is the same bytes."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_tools import examine, folder, pictures, sources
from data_tools.curate import command as curate
from data_tools.curate import crops, recipe, saliency, selection
from data_tools.curate.recipe import Crop, Recipe
from data_tools.curate.selection import Picture
from data_tools.drafts import Draft
from data_tools.examine import Measures
from tests.unit import hostile
from train.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


def rules(tmp_path: Path, **changes: object) -> Recipe:
    base = {"source": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    return Recipe.model_validate_json(json.dumps(base | changes))  # lists count as tuples there


def scene(path: Path, *, seed: int, width: int = 96, height: int = 64, blur: float = 0) -> Path:
    """Large shapes on a ground: like themselves after saving and blurring, unlike other seeds."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 255, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.filter(ImageFilter.GaussianBlur(blur)).save(path)
    path.with_suffix(".txt").write_text(f"scene {seed}")
    return path


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def rows(home: Path) -> dict[str, dict]:
    lines = (home / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["file_name"]: row for row in map(json.loads, lines)}


def made(recipe: Recipe, **options: bool) -> Path:
    version, plan = curate.run(recipe, **options)
    assert plan is not None
    return version


def entries(version: Path) -> dict[str, dict]:
    listed = json.loads((version / "manifest.json").read_text(encoding="utf-8"))["pictures"]
    return {entry["name"]: entry for entry in listed}


# ---- recipes


def test_the_example_is_valid() -> None:
    found = recipe.load(ROOT / "configs/curate/example.yaml")
    assert [concept.name for concept in found.concepts] == ["hero", "world"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("source: a", ": output: missing; it must be text, not empty"),
        ("source: a\noutput: b\nexlude: {}", ":3: exlude: unknown key; did you mean 'exclude'?"),
        (
            "source: a\noutput: b\nexclude:\n  blur: 3",
            ":4: exclude.blur: unknown key; allowed here: names, match, captions",
        ),
        (
            "source: a\noutput: b\nexclude:\n  captions: ['(']",
            ":4: exclude.captions: '(' isn't a regular expression",
        ),
        (
            "source: a\noutput: b\nvalidation: {fraction: 0.6}",
            ":3: validation.fraction: must be a number from 0 to 0.5; got 0.6",
        ),
        (
            "source: a\noutput: b\ncrop:\n  - {match: x, to: face}",
            ":4: crop, item 1.to: must be 'centre', 'subject' or 'box'; got 'face'",
        ),
        (
            "source: a\noutput: b\ncrop:\n  - {match: x, to: centre}",
            ":4: crop, item 1.aspect: missing; a crop to 'centre' needs it",
        ),
        (
            "source: a\noutput: b\ncrop:\n  - {match: x, to: centre, aspect: '1.5'}",
            ":4: crop, item 1.aspect: must be width:height in whole numbers",
        ),
        (
            "source: a\noutput: b\ncrop:\n  - {match: x, to: box, box: [5, 0, 5, 9]}",
            ":4: crop, item 1.box: is empty; write left, top, right, bottom",
        ),
        (
            "source: a\noutput: b\nbalance: true\nconcepts:\n  - {name: a, match: x}",
            ":3: balance: needs at least two concepts",
        ),
        (
            "source: a\noutput: b\nconcepts:\n  - {name: a, match: x, weight: 2}",
            ":3: concepts: weight has no effect without balance; remove it",
        ),
    ],
)
def test_a_fault_has_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        recipe.load(path)
    assert str(caught.value).startswith(f"{path}{said}")


# ---- measures


def measured(path: Path) -> Measures:
    return examine.measure(pictures.look(path, side=examine.SIDE)[1])


def test_like_pictures_are_one_group_and_blur_shows(tmp_path: Path) -> None:
    sharp, soft, other = (
        measured(scene(tmp_path / name, seed=seed, blur=blur, width=300, height=200))
        for name, seed, blur in [("a.png", 1, 0), ("b.jpg", 1, 3), ("c.png", 2, 0)]
    )
    assert (sharp.phash ^ soft.phash).bit_count() <= 6 < (sharp.phash ^ other.phash).bit_count()
    assert examine.alike([sharp, soft, other], bits=6) == [[0, 1]]
    noise = hostile.picture(tmp_path / "n.png")
    blurred = tmp_path / "blurred.png"
    pictures.load_rgb(noise).filter(ImageFilter.GaussianBlur(2)).save(blurred)
    assert measured(noise).sharpness > 5 * measured(blurred).sharpness


def test_chains_are_one_group(tmp_path: Path) -> None:
    one = measured(scene(tmp_path / "a.png", seed=1))

    def groups(*hashes: int, bits: int) -> list[list[int]]:
        return examine.alike([replace(one, phash=value) for value in hashes], bits=bits)

    assert groups(0b0, 0b1111, 0b11, 0xFFFF, bits=2) == [[0, 1, 2]]
    assert groups(bits=2) == []
    assert groups(2**64 - 1, 0, bits=16) == []


def test_saliency_finds_what_stands_out() -> None:
    pixels = np.random.default_rng(0).normal(120, 2, (200, 300)).astype(np.uint8)
    pixels[60:90, 220:250] = 250
    found = saliency.saliency(Image.fromarray(pixels))
    assert found.shape == (43, 64)
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert 12 <= row <= 20
    assert 46 <= column <= 54


# ---- crops


@pytest.mark.parametrize(
    ("to", "aspect", "size", "box"),
    [
        ("centre", "1:1", (300, 200), (50, 0, 250, 200)),
        ("centre", "3:1", (300, 200), (0, 50, 300, 150)),
        ("centre", "3:2", (300, 200), (0, 0, 300, 200)),
        ("centre", "1:2", (301, 200), (100, 0, 200, 200)),
        ("subject", "1:1", (300, 200), (50, 0, 250, 200)),  # nothing stands out
        ("centre", "9999:1", (300, 200), (0, 99, 300, 100)),
    ],
)
def test_boxes(to: str, aspect: str, size: tuple[int, int], box: tuple[int, ...]) -> None:
    rule = Crop.model_validate({"match": "*", "to": to, "aspect": aspect})
    assert crops.box(rule, Image.new("RGB", size, "grey")) == box


@pytest.mark.parametrize("upright", [False, True])
def test_a_crop_follows_the_subject(upright: bool) -> None:
    pixels = np.random.default_rng(0).normal(120, 2, (200, 400)).astype(np.uint8)
    pixels[60:100, 330:370] = 250
    image = Image.fromarray(pixels.T if upright else pixels)
    left, top, right, bottom = crops.box(Crop(match="*", to="subject", aspect="1:1"), image)
    assert (right - left, bottom - top) == (200, 200)
    start, other = (top, left) if upright else (left, top)
    assert other == 0
    assert 170 <= start <= 200


def test_cropped_pixels_are_what_training_would_see(tmp_path: Path) -> None:
    upright, box = hostile.quadrants(), (10, 5, 90, 60)
    rgba = Image.fromarray(np.dstack([upright, np.full((64, 96), 90, np.uint8)]))
    grey = Image.fromarray((np.arange(96 * 64).reshape(64, 96) * 10).astype(np.uint16))
    profile = hostile.rgb_profile(
        red=(0.51, 0.24, 0.001), green=(0.29, 0.69, 0.04), blue=(0.16, 0.07, 0.78), gamma=1.8
    )
    hostile.oriented(tmp_path / "turned.jpg", upright, 6)
    hostile.oriented(tmp_path / "turned.webp", upright, 3)
    hostile.oriented(tmp_path / "turned.tif", upright, 8)
    rgba.save(tmp_path / "alpha.png")
    grey.save(tmp_path / "grey16.png")
    Image.fromarray(upright).save(tmp_path / "profile.png", icc_profile=profile)
    Image.fromarray(upright).quantize(8).save(tmp_path / "palette.gif")
    Image.fromarray(upright).quantize(8).save(tmp_path / "clear.png", transparency=2)
    Image.fromarray(upright).save(tmp_path / "key.png", transparency=(200, 30, 30))
    Image.fromarray(upright).convert("CMYK").save(tmp_path / "ink.jpg", quality=99)
    for path in sorted(tmp_path.iterdir()):
        cropped = tmp_path / "out" / f"{path.name}.png"
        cropped.parent.mkdir(exist_ok=True)
        cropped.write_bytes(crops.png(path, box))
        expected = np.asarray(pictures.load_rgb(path).crop(box))
        np.testing.assert_array_equal(np.asarray(pictures.load_rgb(cropped)), expected, path.name)
    assert Image.open(tmp_path / "out/alpha.png.png").mode == "RGBA"
    assert Image.open(tmp_path / "out/grey16.png.png").mode == "I;16"
    assert Image.open(tmp_path / "out/profile.png.png").info["icc_profile"] == profile


# ---- what is chosen


def picture(name: str, *, seed: int, width: int = 96, height: int = 96) -> Picture:
    """A picture that is like none of another seed."""
    random = np.random.default_rng(seed)
    unlike = Measures(int(random.integers(0, 2**63)) * 2, bytes(192), 1.0, 0.5, 0.0, 0.0)
    return Picture(Draft(name, "", ""), f"{seed:064x}", width, height, unlike)


def library(count: int, *, first: int = 0, top: str = "") -> list[Picture]:
    sizes = [(96, 96), (192, 96), (96, 192), (96, 96)]
    return [
        picture(f"{top}{i}.png", seed=i, width=sizes[i % 4][0], height=sizes[i % 4][1])
        for i in range(first, first + count)
    ]


def test_the_held_out_set_is_representative(tmp_path: Path) -> None:
    concepts = [{"name": "a", "match": "a/*"}, {"name": "b", "match": "b/*"}]
    recipe = rules(tmp_path, validation={"fraction": 0.1}, concepts=concepts)
    known = library(80, top="a/") + library(40, first=80, top="b/")
    held = selection.held_out(known, recipe)
    shapes = {p.draft.name: p.shape for p in known}
    chosen = sorted((name[0], shapes[name]) for name in held)
    assert chosen == [("a", "square")] * 4 + [("a", "tall")] * 2 + [("a", "wide")] * 2 + [
        *([("b", "square")] * 2),
        ("b", "tall"),
        ("b", "wide"),
    ]
    assert selection.held_out(known[::-1], recipe) == held
    renamed = [
        replace(p, draft=replace(p.draft, name=f"{p.draft.name[:2]}x{i}"))
        for i, p in enumerate(known)
    ]
    places = [i for i, p in enumerate(known) if p.draft.name in held]
    assert {p.draft.name for i, p in enumerate(renamed) if i in places} == selection.held_out(
        renamed, recipe
    )


def test_new_pictures_dont_reshuffle(tmp_path: Path) -> None:
    recipe = rules(tmp_path, validation={"fraction": 0.1})
    changes = []
    for count in range(40, 140):
        before = selection.held_out(library(count), recipe)
        after = selection.held_out(library(count + 1), recipe)
        changes.append(len((before ^ after) - {f"{count}.png"}))
    assert max(changes) <= 4
    assert sum(changes) <= 40  # of 100 pictures that came, in sets of 4 to 14 held out
    assert len(selection.held_out(library(140), recipe)) == 14


def test_near_duplicates_never_straddle(tmp_path: Path) -> None:
    recipe = rules(tmp_path, validation={"fraction": 0.3}, near_duplicate_bits=2)
    known = library(30)
    twins = [
        Picture(
            Draft(f"twin{i}.png", "", ""),
            f"{i + 500:064x}",
            p.width,
            p.height,
            replace(p.measures, phash=p.measures.phash ^ 3),
        )
        for i, p in enumerate(known)
    ]
    held = selection.held_out(known + twins, recipe)
    assert len(held) == 18
    assert all((f"{i}.png" in held) == (f"twin{i}.png" in held) for i in range(30))


def test_a_fraction_that_holds_none_out(tmp_path: Path) -> None:
    recipe = rules(tmp_path, validation={"fraction": 0.1})
    with pytest.raises(DataError, match=r"0\.1 of 4 pictures holds none out; raise it"):
        selection.held_out(library(4), recipe)
    half = rules(tmp_path, validation={"fraction": 0.5})
    with pytest.raises(DataError, match="holds none out"):
        selection.held_out(library(1), half)  # never all of a concept


@pytest.mark.parametrize(
    ("shown", "weights", "factors"),
    [
        ({"a": 10, "b": 10}, {"a": 1, "b": 1}, {"a": 1, "b": 1}),
        ({"a": 10, "b": 30}, {"a": 1, "b": 1}, {"a": 3, "b": 1}),
        ({"a": 10, "b": 25}, {"a": 1, "b": 1}, {"a": 5, "b": 2}),
        ({"a": 10, "b": 30}, {"a": 2, "b": 1}, {"a": 6, "b": 1}),
        ({"a": 100, "b": 104}, {"a": 1, "b": 1}, {"a": 1, "b": 1}),
        ({"a": 12, "b": 24, "c": 7}, {"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 1, "c": 3}),
    ],
)
def test_balance(shown: dict, weights: dict, factors: dict) -> None:
    found = selection.balanced(shown, weights)
    if "c" not in shown:
        assert found == factors
    parts = [shown[name] * factor / weights[name] for name, factor in found.items()]
    assert max(parts) / min(parts) <= 1.11


def test_repeats_multiply(tmp_path: Path) -> None:
    concepts = [{"name": "a", "match": "a*", "repeats": 3}]
    own = [replace(p, draft=replace(p.draft, repeats=2)) for p in library(1, top="a")]
    found = selection.repeats([*own, picture("z.png", seed=9)], rules(tmp_path, concepts=concepts))
    assert found == {"a0.png": 6, "z.png": 1}


def test_balance_leaves_nobody_out(tmp_path: Path) -> None:
    concepts = [{"name": "a", "match": "a*"}, {"name": "b", "match": "b*"}]
    recipe = rules(tmp_path, concepts=concepts, balance=True)
    with pytest.raises(DataError, match=r"these are of no concept; .*\n  z0\.png"):
        selection.repeats(library(2, top="a") + library(1, first=0, top="z"), recipe)
    with pytest.raises(DataError, match="the concept 'b' has no pictures to train"):
        selection.repeats(library(2, top="a"), recipe)


# ---- whole versions


def studio(root: Path) -> Path:
    for seed in range(8):
        scene(root / f"hero/{seed}.png", seed=seed, width=96 + seed)
    scene(root / "hero/0-again.jpg", seed=0, width=120, height=80)
    scene(root / "draft/9.png", seed=9)
    scene(root / "world/10.png", seed=10).with_suffix(".txt").write_text("Watermark: x")
    scene(root / "world/11.png", seed=11, width=60, height=40)
    scene(root / "world/12.png", seed=12)
    return root


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
    assert sources.gather(version / "train", folder.listing(version / "train")).faults == []
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
    assert curate.main([str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "exclude.match: 'zz*' matches no picture" in said
    assert "Sharpness, from the lowest" in said
    assert not (tmp_path / "out").exists()
    assert curate.main([str(path)]) == 0
    [version] = (tmp_path / "out").iterdir()
    assert capsys.readouterr().out.splitlines()[-1] == str(version)
    assert curate.main([str(path)]) == 0
    assert capsys.readouterr().out == f"{version}: is this recipe on these pictures already\n"
    path.write_text("source: nowhere\noutput: x\n")
    assert curate.main([str(path)]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    again = recipe.load(version / "recipe.yaml")
    assert curate.run(again) == (version, None)
