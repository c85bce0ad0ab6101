"""`kindling import`: a parquet file, a WebDataset tar or a hub data set, as a folder of pictures.

Owns the command. Pictures keep their bytes and, where they have one, their name.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from data_tools import folder
from data_tools.captions import TextError
from data_tools.exchange import containers, samples, tars
from data_tools.exchange.containers import Columns
from data_tools.exchange.samples import Sample
from train.errors import DataError, bullet_list


def main(argv: Sequence[str] | None = None) -> int:
    """Make a folder of pictures with a metadata.jsonl out of a data set. Stopped and started again,
    it goes on where it was; the folder is there only once it is whole. Nothing is overwritten."""
    options = _parser().parse_args(argv)
    columns = Columns(options.image, options.text, tuple(options.references))
    count, notes = run(
        options.source,
        options.output,
        split=options.split,
        subset=options.subset,
        columns=columns,
        skip_bad=options.skip_bad,
    )
    print(f"{options.output}: {count} pictures; now set data.path to it")
    for note in notes:
        print(f"  {note}")
    return 0


def run(
    source: str,
    output: Path,
    *,
    split: str | None = None,
    subset: str | None = None,
    columns: Columns | None = None,
    skip_bad: bool = False,
) -> tuple[int, list[str]]:
    """Import `source` as the new folder `output`; how many pictures, and what was left behind.

    Raises DataError; what is done by then is kept for the next try.
    """
    columns = columns or Columns()
    samples.check_new(output)
    _check_source(source)
    identity = {
        "source": source,
        "files": _fingerprint(source),
        "options": [split, subset, columns.image, columns.text, list(columns.references)],
    }
    ignored: set[str] = set()
    if not source.startswith(containers.HUB) and tars.is_tar(Path(source)):
        paths = tars.files(Path(source))
        writer = samples.Folder(output, identity=identity)
        found = tars.read(paths, columns=columns, skip=len(writer), ignored=ignored)
    else:
        table = containers.open_table(source, split=split, subset=subset, columns=columns)
        ignored = table.ignored
        writer = samples.Folder(output, identity=identity)
        found = containers.read(table, source, skip=len(writer), names=writer.names)
    _copy(found, writer)
    faults = [f"{where}: {reason}" for where, reason in writer.faults]
    if faults and not skip_bad:
        title = f"{source}: these can't be imported; --skip-bad leaves them out:"
        raise DataError(bullet_list(title, faults))
    count = writer.finish()
    notes = [f"left out: {fault}" for fault in faults]
    if ignored:
        notes.append(f"not carried over: {', '.join(sorted(ignored))}")
    return count, notes


def _copy(found: Iterator[tuple[str, Sample | TextError]], writer: samples.Folder) -> None:
    try:
        for where, sample in tqdm(found, initial=len(writer), desc="import", unit="", delay=2):
            try:
                if isinstance(sample, TextError):
                    raise sample
                writer.add(sample)
            except TextError as error:
                writer.refuse(where, str(error))
    finally:
        writer.close()


def _check_source(source: str) -> None:
    if source.startswith(containers.HUB):
        return
    path = Path(source)
    if not path.exists():
        hint = f"; for a data set on the hub write hf:{source}" if source.count("/") == 1 else ""
        raise DataError(f"{source}: no such file or folder{hint}")
    if path.is_file() and not folder.is_container(path.name):
        raise DataError(f"{source}: not a parquet or tar file")
    if path.is_dir() and not (path / "state.json").exists():
        found = folder.listing(path)
        if found.pictures:
            raise DataError(
                f"{source}: a folder of pictures, which training reads in place: set data.path "
                "to it. `kindling pack` copies it in the form that this would have"
            )
        if not any(map(folder.is_container, found.others)):
            raise DataError(f"{source}: holds no parquet or tar files")


def _fingerprint(source: str) -> list[list[object]]:
    """Names, sizes and times of a local source's files."""
    path = Path(source)
    if source.startswith(containers.HUB):
        return []
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    facts = [(file, file.stat()) for file in files]
    return [[str(file), status.st_size, status.st_mtime_ns] for file, status in facts]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kindling import", description=main.__doc__)
    parser.add_argument(
        "source",
        help="a .parquet or .tar file, a folder of them, a saved `datasets` folder, "
        "or hf:NAME[@REVISION] on the Hugging Face hub, which is streamed",
    )
    parser.add_argument("output", type=Path, help="the new folder")
    parser.add_argument("--split", help="of a data set with several (default: train)")
    parser.add_argument("--subset", help="of a hub data set with several configurations")
    parser.add_argument(
        "--image", metavar="COLUMN", help="the picture's column, in a tar its field"
    )
    parser.add_argument("--text", metavar="COLUMN", help="the caption's column; - means none")
    parser.add_argument(
        "--references",
        metavar="COLUMN",
        nargs="+",
        default=[],
        help="pictures that an edit starts from",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out what can't be imported")
    return parser
