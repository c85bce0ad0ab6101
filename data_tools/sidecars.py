"""Caption files and references beside pictures, and kohya's folders named for repeats and caption.

Owns these conventions and what can be wrong with their text. Opens no picture.

Sidecars: `a.txt`, `a.caption` (kohya) or `a.json` with a key `caption` (ai-toolkit) beside `a.png`
is its caption. A JSON file without that key is somebody else's and only noted.

References: `a.ref.png`, or `a.ref1.png`, `a.ref2.png` and so on, beside `a.png` are the pictures
that an edit to `a.png` starts from. Tables name theirs in a column.

kohya: if every picture lies in a top-level folder `N_name` (N from 0 to 999), N is the repeats and
`name` the caption of pictures without a caption file, as sd-scripts' DreamBooth method has it; 0
leaves a folder out. Unlike there, a caption file is read whole, not only its first line, and
folders within are read too. Larger numbers are years and the like, not repeats.
"""

import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data_tools import captions, folder, tables
from data_tools.captions import TextError
from data_tools.drafts import Draft, Drafts, Fault, Note

_REFERENCE = re.compile(r"(.*[^/])\.ref([0-9]*)", re.DOTALL)
_CONCEPT = re.compile(r"([0-9]{1,3})_(.*)", re.DOTALL)


class _Concept(NamedTuple):
    """A kohya folder's name, taken apart."""

    repeats: int
    caption: str


def read(root: Path, found: folder.Listing) -> Drafts:
    """The drafts of a folder whose captions lie in files of their own."""
    result = Drafts()
    found, references = _split(found, result)
    concepts = _concepts(found, result)
    pictures = Counter(map(folder.stem, found.pictures))
    texts = _texts(root, found.captions, result)
    clashes: dict[str, list[str]] = defaultdict(list)
    for name in found.pictures:
        stem, concept = folder.stem(name), concepts.get(_top(name))
        if concept and not concept.repeats:
            continue
        files = texts.get(stem, {})
        if files and pictures[stem] + len(files) > 2:
            clashes[stem].append(name)
            continue
        source, caption = f"{PurePosixPath(name).with_suffix('.txt')}", ""
        if files:
            [(source, caption)] = files.items()
        elif concept:
            source, caption = _top(name), captions.clean(concept.caption)
        if caption is not None:
            repeats = concept.repeats if concept else 1
            names = references.get(stem, ())
            result.drafts.append(Draft(name, caption, source, names, repeats=repeats))
    for stem, names in clashes.items():
        claim = f"captions {' and '.join(names)}; give each picture one caption file of its own"
        result.faults.append(Fault(" and ".join(texts[stem]), claim))
    for stem, files in texts.items():
        if stem not in pictures:
            result.notes += [Note(name, "a caption without a picture") for name in files]
    return result


def _split(
    found: folder.Listing, result: Drafts
) -> tuple[folder.Listing, dict[str, tuple[str, ...]]]:
    """The listing without reference files, and those by the stem of their picture."""
    stems = set(map(folder.stem, found.pictures))
    numbered: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in found.pictures:
        match = _REFERENCE.fullmatch(folder.stem(name))
        if match and match[1] in stems:
            numbered[match[1]].append((int(match[2] or 0), name))
    references = {stem: tuple(n for _, n in sorted(some)) for stem, some in numbered.items()}
    names = {name for some in references.values() for name in some}
    pictures = [name for name in found.pictures if name not in names]
    if references:
        alone = [name for name in pictures if folder.stem(name) not in references]
        text = "has no reference, as others here have; trained as a picture of its own"
        result.notes += [Note(name, text) for name in alone]
    return replace(found, pictures=pictures), references


def _texts(root: Path, names: list[str], result: Drafts) -> dict[str, dict[str, str | None]]:
    """Stem -> caption file -> caption; None if it is unfit, which is noted as a fault."""
    texts: dict[str, dict[str, str | None]] = defaultdict(dict)
    for name in names:
        caption: str | None = None
        try:
            if PurePosixPath(name).suffix.lower() != ".json":
                caption = captions.read(root / name)
            else:
                row = tables.parse(captions.load(root / name))
                if "caption" not in row:
                    result.notes.append(Note(name, "not read: it has no key 'caption'"))
                    continue
                caption = captions.clean(tables.caption_of({"caption": row["caption"]}))
        except TextError as error:
            result.faults.append(Fault(name, str(error)))
        texts[folder.stem(name)][name] = caption
    return texts


def _concepts(found: folder.Listing, result: Drafts) -> dict[str, _Concept]:
    """kohya's folders by name; none if any picture lies outside such a folder."""
    tops = dict.fromkeys(_top(name) for name in found.pictures)
    matches = {top: match for top in tops if (match := _CONCEPT.fullmatch(top))}
    if len(matches) < len(tops):
        for top in matches:
            text = "read as an ordinary folder, not kohya's, as pictures lie outside such folders"
            result.notes.append(Note(top, text))
        return {}
    concepts = {top: _Concept(int(match[1]), match[2]) for top, match in matches.items()}
    for top, concept in concepts.items():
        text = "not used: kohya's folder with 0 repeats"
        if concept.repeats:
            times = f"{concept.repeats} repeat" + "s" * (concept.repeats > 1)
            text = f"kohya's folder: {times}, caption {concept.caption!r} where there is none"
        result.notes.append(Note(top, text))
    return concepts


def _top(name: str) -> str:
    """The folder at the top that a file lies in; empty if it lies at the top itself."""
    top, slash, _ = name.partition("/")
    return top if slash else ""
