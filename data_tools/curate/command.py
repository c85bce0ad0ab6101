"""`kindling curate`: a folder of pictures and a recipe to a new, versioned data set.

Owns the command and the version's folder. What stays and where it goes is decided in `selection`.

A version is what its content is: the digest of the recipe and of all that it reads. The same
recipe on the same pictures is the same version, with the same bytes, and isn't made twice; anything
else is a new folder beside it. It holds `train/` and, if pictures are held out, `validation/`, each
a folder of pictures with a metadata.jsonl, the recipe, and a manifest that accounts for every
picture. Pictures are copies (or hard links) of the originals; only a crop is written anew, as PNG.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data_tools import drafts, examine, folder, pictures
from data_tools.curate import crops, selection
from data_tools.curate import recipe as recipes
from data_tools.curate.recipe import Recipe
from data_tools.curate.selection import Picture
from data_tools.drafts import Draft
from data_tools.exchange import samples
from data_tools.pictures import PictureError
from train.errors import DataError, bullet_list

MANIFEST = "manifest.json"
TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Chosen:
    """A picture that the version has."""

    picture: Picture
    part: str
    repeats: int
    box: crops.Box | None

    @property
    def name(self) -> str:
        """In its part's folder."""
        name = self.picture.draft.name
        return f"{name}.crop.png" if self.box else name


@dataclass(frozen=True)
class Plan:
    """What a version will be."""

    pictures: list[Picture]
    chosen: list[Chosen]
    excluded: dict[str, list[str]]
    concepts: dict[str, str]
    idle: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Make a data set as a recipe says. Originals are only read, and nothing is overwritten."""
    parser = argparse.ArgumentParser(prog="kindling curate", description=main.__doc__)
    parser.add_argument("recipe", type=Path, help="YAML; see configs/curate/example.yaml")
    parser.add_argument("--link", action="store_true", help="hard links instead of copies")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, measures too"
    )
    options = parser.parse_args(argv)
    recipe = recipes.load(options.recipe)
    if options.dry_run:
        found = samples.of_folder(Path(recipe.source).expanduser())
        print(text(plan(recipe, found), measured=True))
        return 0
    version, made = run(recipe, link=options.link)
    if made:
        print(text(made))
    print(f"{version}" + ("" if made else ": is this recipe on these pictures already"))
    return 0


def run(recipe: Recipe, *, link: bool = False) -> tuple[Path, Plan | None]:
    """The version's folder, and what was done, or None if it was there. Raises DataError."""
    root, output = Path(recipe.source).expanduser(), Path(recipe.output).expanduser()
    if output.resolve().is_relative_to(root.resolve()):
        raise DataError(f"output: {output} lies in the source, which would then hold it; move it")
    found = samples.of_folder(root)
    inputs = _inputs(root, found)
    digest = _digest(recipe, found, inputs)
    if there := [path for path in output.glob(f"v*-{digest[:8]}") if path.is_dir()]:
        _verify(there[0])
        return there[0], None
    plan_ = plan(recipe, found)
    part = output / f".{digest[:8]}.part"
    try:
        if part.exists():
            shutil.rmtree(part)  # left of a run that was killed
        part.mkdir(parents=True)
        _write(part, root, plan_, link=link)
        _write_manifest(part, recipe, plan_, inputs=inputs, digest=digest)
        numbers = [int(m[1]) for p in output.iterdir() if (m := re.match(r"v(\d+)-", p.name))]
        version = output / f"v{max(numbers, default=0) + 1}-{digest[:8]}"
        part.rename(version)
    except OSError as error:
        raise DataError(
            f"{error.filename or output}: can't be written ({error.strerror})"
        ) from None
    return version, plan_


def plan(recipe: Recipe, found: list[Draft]) -> Plan:
    """What the recipe makes of a folder's drafts. Raises DataError."""
    root = Path(recipe.source).expanduser()
    measured, unfit = _measure(root, found)
    if unfit and not recipe.exclude.bad_pictures:
        title = f"{root}: mend or remove these, or set exclude.bad_pictures:"
        raise DataError(bullet_list(title, [f"{name}: {why}" for name, why in unfit.items()]))
    excluded = selection.excluded(measured, recipe)
    kept = [picture for picture in measured if picture.draft.name not in excluded]
    if not kept:
        lines = [f"{name}: {', '.join(why)}" for name, why in excluded.items()]
        raise DataError(bullet_list("exclude: no picture is left:", lines))
    boxes = _boxes(root, kept, recipe)
    held = selection.held_out(kept, recipe)
    trained = [picture for picture in kept if picture.draft.name not in held]
    repeats = selection.repeats(trained, recipe)
    chosen = [
        Chosen(
            picture,
            VALIDATION if picture.draft.name in held else TRAIN,
            repeats.get(picture.draft.name, 1),
            boxes.get(picture.draft.name),
        )
        for picture in kept
    ]
    excluded |= {name: [reason] for name, reason in unfit.items()}
    concepts = {picture.draft.name: selection.concept_of(picture, recipe) for picture in kept}
    idle = selection.idle([draft.name for draft in found], recipe)
    return Plan(measured, chosen, excluded, concepts, idle)


def text(plan_: Plan, *, measured: bool = False) -> str:
    """The plan for a console."""
    parts = Counter(chosen.part for chosen in plan_.chosen)
    lines = [f"{len(plan_.pictures)} pictures: {parts[TRAIN]} to train, {parts[VALIDATION]} held "
             f"out, {len(plan_.excluded)} left out"]  # fmt: skip
    for concept in sorted(set(plan_.concepts.values())):
        own = [c for c in plan_.chosen if plan_.concepts[c.picture.draft.name] == concept]
        trained = [c.repeats for c in own if c.part == TRAIN]
        title = concept or ("of no concept" if any(plan_.concepts.values()) else "of all")
        shown = f"{sum(trained)} showings an epoch of {len(trained)}"
        lines.append(f"  {title}: {shown}, {len(own) - len(trained)} held out")
    lines += [f"  {note}" for note in plan_.idle]
    if plan_.excluded:
        reasons = [f"{name}: {'; '.join(why)}" for name, why in plan_.excluded.items()]
        lines.append(bullet_list("Left out", reasons, limit=1000 if measured else 20))
    if measured:
        rows = sorted(plan_.pictures, key=lambda picture: picture.measures.sharpness)
        facts = [
            f"{p.measures.sharpness:10.2f}  {p.width}x{p.height}  {p.draft.name}" for p in rows
        ]
        lines.append(bullet_list("Sharpness, from the lowest", facts, limit=len(facts)))
    return "\n".join(lines)


# ---- looking at the pictures


def _measure(root: Path, found: list[Draft]) -> tuple[list[Picture], dict[str, str]]:
    """Measures of all that can be read, in the folder's order; name -> reason for the rest."""

    def look(draft: Draft) -> Picture | PictureError:
        try:
            probe, small = pictures.look(root / draft.name, side=examine.SIDE)
        except PictureError as error:
            return error
        found = examine.measure(small)
        return Picture(draft, probe.sha256, probe.width, probe.height, found)

    results = _each(look, found, title="measure")
    pairs = list(zip(found, results, strict=True))
    unfit = {d.name: result.reason for d, result in pairs if isinstance(result, PictureError)}
    return [result for result in results if isinstance(result, Picture)], unfit


def _each(function: Callable, items: Sequence, *, title: str) -> list:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(tqdm(pool.map(function, items), total=len(items), desc=title, delay=2))


def _boxes(root: Path, kept: list[Picture], recipe: Recipe) -> dict[str, crops.Box]:
    """Name -> box of each that is cropped. Raises DataError with all that can't be."""
    boxes, faults = {}, []
    for picture in kept:
        draft = picture.draft
        rule = next((r for r in recipe.crop if selection.matches(draft.name, r.match)), None)
        if rule is None:
            continue
        if draft.references or draft.mask is not None:
            what = "references" if draft.references else "a mask"
            faults.append(f"{draft.name}: has {what}, which a crop would tear away from it")
            continue
        try:
            box = crops.box(rule, pictures.load_rgb(root / draft.name))
        except DataError as error:
            faults.append(f"{draft.name}: {error}")
            continue
        if box != (0, 0, picture.width, picture.height):
            boxes[draft.name] = box
    if faults:
        raise DataError(bullet_list("crop: these can't be cropped; change the patterns:", faults))
    return boxes


# ---- the version


def _inputs(root: Path, found: list[Draft]) -> dict[str, str]:
    """sha256 of every file that the drafts name. Raises DataError."""
    names = dict.fromkeys(
        name for d in found for name in (d.name, *d.references, d.mask) if name is not None
    )

    def digest(name: str) -> str:
        try:
            with (root / name).open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{root / name}: can't be opened ({error.strerror})") from None

    return dict(zip(names, _each(digest, list(names), title="read"), strict=True))


def _digest(recipe: Recipe, found: list[Draft], inputs: dict[str, str]) -> str:
    rules = recipe.model_dump(mode="json", exclude={"source", "output"})
    rows = sorted(samples.dump(drafts.row(draft)) for draft in found)
    facts = ["kindling curate 1", rules, rows, sorted(inputs.items())]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _write(part: Path, root: Path, plan_: Plan, *, link: bool) -> None:
    lines: dict[str, list[str]] = {}
    for chosen in tqdm(plan_.chosen, desc="write", delay=2):
        draft, home = chosen.picture.draft, part / chosen.part
        if chosen.box:
            _place(home / chosen.name, crops.png(root / draft.name, chosen.box))
        names = [*([] if chosen.box else [draft.name]), *draft.references]
        for name in [*names, *([] if draft.mask is None else [draft.mask])]:
            _place(home / name, root / name, link=link)
        row = drafts.row(replace(draft, name=chosen.name, repeats=chosen.repeats))
        lines.setdefault(chosen.part, []).append(samples.dump(row) + "\n")
    for name, rows in lines.items():
        path = part / name / folder.METADATA
        path.write_text("".join(rows), encoding="utf-8", newline="\n")


def _place(path: Path, content: bytes | Path, *, link: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.exists():
        return  # the reference of another picture, too
    elif link:
        os.link(content.resolve(), path)
    else:
        shutil.copyfile(content, path)


def _write_manifest(
    part: Path, recipe: Recipe, plan_: Plan, *, inputs: dict[str, str], digest: str
) -> None:
    from train.config import reading

    (part / "recipe.yaml").write_text(reading.dump(recipe), encoding="utf-8")
    chosen = {c.picture.draft.name: c for c in plan_.chosen}
    measured = {picture.draft.name: picture for picture in plan_.pictures}
    rows = []
    for name in sorted({*measured, *plan_.excluded}, key=folder.natural):
        row: dict[str, object] = {"name": name, "sha256": inputs[name]}
        if picture := measured.get(name):
            row |= {"width": picture.width, "height": picture.height}
            seen = picture.measures
            row |= {"phash": f"{seen.phash:016x}", "sharpness": round(seen.sharpness, 3)}
        if name in plan_.excluded:
            row["excluded"] = plan_.excluded[name]
        else:
            one = chosen[name]
            row |= {"file": f"{one.part}/{one.name}", "repeats": one.repeats}
            row |= {"concept": plan_.concepts[name]} if plan_.concepts[name] else {}
            row |= {"crop": list(one.box)} if one.box else {}
        rows.append(row)
    rules = recipe.model_dump(mode="json", exclude={"source", "output"})
    facts = {"format": "kindling curate 1", "digest": digest, "recipe": rules, "pictures": rows}
    facts["files"] = _hashes(part)
    text = json.dumps(facts, ensure_ascii=False, indent=1) + "\n"
    (part / MANIFEST).write_text(text, encoding="utf-8", newline="\n")


def _hashes(home: Path) -> dict[str, str]:
    paths = (p for name in (TRAIN, VALIDATION) for p in (home / name).rglob("*") if p.is_file())
    files = sorted(path.relative_to(home).as_posix() for path in paths)
    return {name: hashlib.sha256((home / name).read_bytes()).hexdigest() for name in files}


def _verify(version: Path) -> None:
    """Raises DataError if a version isn't what its manifest says."""
    try:
        files = json.loads((version / MANIFEST).read_text(encoding="utf-8"))["files"]
        now = _hashes(version)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{version}: its {MANIFEST} can't be read ({error}); remove it") from None
    changed = sorted(name for name in {*files, *now} if files.get(name) != now.get(name))
    if changed:
        title = f"{version}: changed since it was made; remove it to have it made again:"
        raise DataError(bullet_list(title, changed))
