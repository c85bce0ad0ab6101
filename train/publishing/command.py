"""`kindling publish`: a run's adapter as a folder that is ready to upload, and its upload.

The folder has the adapter with its metadata, the certificate, a model card, pictures, the licence
and its notice; and sheets for Civitai and LiblibAI, which aren't uploaded. Edit its README.md, then
publish the folder itself. Captions stay private.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from train.errors import ConfigError, bullet_list
from train.publishing import facts, folder, licences, push
from train.publishing.facts import Wishes


def main(argv: list[str] | None = None) -> int:
    """Publish from the command line; 0 if nothing forbids the upload, else 1."""
    arguments = _parse(argv)
    if arguments.push:
        push.check_name(arguments.push)
    source: Path = arguments.run
    if folder.is_published(source):
        _refuse_changes(arguments)
        return _deliver(source, arguments, missing=[])
    wishes = Wishes(
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
            return _deliver(Path(scratch), arguments, missing=missing, shown=target)
    with folder.becoming(target, overwrite=arguments.overwrite) as made:
        folder.write(publication, made, repository=arguments.push)
    return _deliver(target, arguments, missing=missing)


def _deliver(
    made: Path, arguments: argparse.Namespace, *, missing: Sequence[str], shown: Path | None = None
) -> int:
    """Say what is in a folder, and upload it if that is asked for and nothing forbids it."""
    faults = folder.faults(made)
    print(_summary(made, shown or made, arguments, missing=missing, faults=faults))
    if arguments.dry_run or not arguments.push:
        return 1 if faults else 0
    if faults:
        raise ConfigError(bullet_list(f"{made}: isn't uploaded:", faults))
    folder.name_repository(made, arguments.push)
    url = push.push(made, arguments.push, private=not arguments.public, update=arguments.update)
    print(f"uploaded: {url}")
    return 0


def _summary(
    made: Path,
    shown: Path,
    arguments: argparse.Namespace,
    *,
    missing: Sequence[str],
    faults: Sequence[str],
) -> str:
    files = folder.listing(made)
    total = sum(size for _, size in files)
    lines = [f"folder: {shown}{' (not written: dry run)' if arguments.dry_run else ''}"]
    lines += [f"  {name:<36} {size / 1e3:>10,.1f} kB" for name, size in files]
    lines.append(f"  {len(files)} files, {total / 1e6:.1f} MB; sheets beside them stay here")
    if arguments.push:
        kind = "public" if arguments.public else "private"
        if arguments.update:
            kind = f"{kind} if it is new, else as it is"
        lines.append(f"repository: {arguments.push} ({kind})")
    fields = folder.front_matter(made)
    licence = licences.of_hub(fields.get("license", ""), fields.get("license_name"))
    lines.append(f"licence: {licence.name if licence else fields.get('license', 'none')}")
    if licence:
        lines += [f"  {duty.section}: {duty.en}" for duty in licence.duties]
    if missing:
        lines.append(bullet_list("not in it:", missing))
    if faults:
        lines.append(bullet_list("forbids the upload:", faults))
    return "\n".join(lines)


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
