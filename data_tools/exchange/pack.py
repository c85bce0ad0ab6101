"""`kindling pack`: a folder of pictures, of any convention, as imagefolder, parquet or tar.

Owns the command. Pictures keep their bytes and names; captions are those of the folder, before the
trigger's rules.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from data_tools.exchange import containers, samples, tars
from train.errors import DataError


def main(argv: Sequence[str] | None = None) -> int:
    """Write a folder of pictures as one file or a plain folder. Nothing is overwritten."""
    parser = argparse.ArgumentParser(prog="kindling pack", description=main.__doc__)
    parser.add_argument("images", type=Path, help="folder of pictures, as training reads it")
    parser.add_argument(
        "output",
        type=Path,
        help="NAME.parquet (Hugging Face), NAME.tar (WebDataset), or a new folder, which gets the "
        "pictures and a metadata.jsonl",
    )
    options = parser.parse_args(argv)
    count = run(options.images, options.output)
    print(f"{options.output}: {count} pictures")
    return 0


def run(root: Path, output: Path) -> int:
    """Write `root` as the new `output`; how many pictures. Raises DataError."""
    samples.check_new(output)
    found = samples.of_folder(root)
    suffix = output.suffix.lower()
    if suffix not in (".parquet", ".tar"):
        if suffix in (".gz", ".tgz", ".zip", ".arrow", ".jsonl", ".csv"):
            raise DataError(f"{output}: can't be written; name a .parquet, a .tar or a new folder")
        return _folder(root, output, found)
    part = output.with_name(f"{output.name}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        (containers if suffix == ".parquet" else tars).write(part, root, found)
        part.rename(output)
    except OSError as error:
        raise DataError(f"{output}: can't be written ({error.strerror or error})") from None
    finally:
        part.unlink(missing_ok=True)
    return len(found)


def _folder(root: Path, output: Path, found: list[samples.Draft]) -> int:
    samples.discard(output.with_name(f"{output.name}.part"))
    writer = samples.Folder(output, identity={"pack": str(root.resolve())})
    try:
        for draft in found:
            writer.add(samples.load(root, draft))
        return writer.finish()
    finally:
        writer.close()
