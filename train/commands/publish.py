"""`kindling publish`: a run's adapter as a folder that is ready to upload, and its upload.

The folder has the adapter with its metadata, the certificate, a model card, pictures, the licence
and its notice; and sheets for Civitai and LiblibAI, which aren't uploaded. Edit its README.md, then
publish the folder itself. Captions stay private.
"""

import argparse
import tempfile
from pathlib import Path

from train.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Publish from the command line; 0 if nothing forbids the upload, else 1."""
    arguments = _parse(argv)
    from train.publishing import delivery, facts, folder, push

    if arguments.push:
        push.check_name(arguments.push)
    upload = delivery.Upload(arguments.push, arguments.public, arguments.update, arguments.dry_run)
    source: Path = arguments.run
    if folder.is_published(source):
        _refuse_changes(arguments)
        return 0 if delivery.deliver(source, upload, missing=[]) else 1
    wishes = facts.Wishes(
        title=arguments.title,
        author=arguments.author,
        description=arguments.description,
        tags=arguments.tags,
        tag_frequency=arguments.tag_frequency,
    )
    publication = facts.gather(source, wishes, online=not arguments.dry_run)
    missing = folder.missing(publication)
    target: Path = arguments.to or source / "publish"
    if arguments.dry_run:
        folder.check_target(target, overwrite=arguments.overwrite)
        with tempfile.TemporaryDirectory() as scratch:
            folder.write(publication, Path(scratch), repository=arguments.push)
            passed = delivery.deliver(Path(scratch), upload, missing=missing, shown=target)
        return 0 if passed else 1
    with folder.becoming(target, overwrite=arguments.overwrite) as made:
        folder.write(publication, made, repository=arguments.push)
    return 0 if delivery.deliver(target, upload, missing=missing) else 1


def _refuse_changes(arguments: argparse.Namespace) -> None:
    """A folder is uploaded as it is. Raises ConfigError for what would change it."""
    given = {
        "--to": arguments.to,
        "--overwrite": arguments.overwrite,
        "--title": arguments.title,
        "--author": arguments.author,
        "--description": arguments.description,
        "--tags": arguments.tags,
        "--tag-frequency": arguments.tag_frequency,
    }
    if used := [name for name, value in given.items() if value]:
        raise ConfigError(
            f"{', '.join(used)}: {arguments.run} is a folder made for publishing and is taken as "
            "it is. Give the run's folder, with --overwrite, to make it anew."
        )


def _tags(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, (tag.strip() for tag in text.split(",")))))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kindling publish", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, or one made by this command")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: RUN/publish")
    parser.add_argument(
        "--overwrite", action="store_true", help="make that folder anew if it is there"
    )
    parser.add_argument("--title", help="instead of the config's export.title")
    parser.add_argument("--author", help="instead of the config's export.author")
    parser.add_argument("--description", help="instead of the config's export.description")
    parser.add_argument("--tags", type=_tags, default=(), metavar="A,B", help="such as character")
    parser.add_argument(
        "--tag-frequency",
        action="store_true",
        help="put the captions' words into the file; without it captions stay private",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload to the Hugging Face Hub")
    parser.add_argument("--public", action="store_true", help="for everybody; default: private")
    parser.add_argument("--update", action="store_true", help="the repository may be there already")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write and upload nothing, ask nobody; say what would",
    )
    arguments = parser.parse_args(argv)
    if not arguments.push and (arguments.public or arguments.update):
        parser.error("--public and --update are for --push")
    return arguments
