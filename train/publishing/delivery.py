"""What is in a folder made for publishing, said before its upload, and the upload."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.errors import ConfigError, bullet_list
from train.publishing import folder, licences, push


@dataclass(frozen=True)
class Upload:
    """Where to, if anywhere."""

    repository: str | None
    public: bool
    update: bool
    """The repository may be there already."""
    dry_run: bool


def deliver(
    made: Path, upload: Upload, *, missing: Sequence[str], shown: Path | None = None
) -> bool:
    """Say what is in a folder, and upload it if that is asked for and nothing forbids it.

    missing: what couldn't be put in. shown: the folder's name if `made` isn't it. Returns whether
    nothing forbids the upload; raises ConfigError if something does and it is asked for.
    """
    faults = folder.faults(made)
    print(_summary(made, shown or made, upload, missing=missing, faults=faults))
    if upload.dry_run or not upload.repository:
        return not faults
    if faults:
        raise ConfigError(bullet_list(f"{made}: isn't uploaded:", faults))
    folder.name_repository(made, upload.repository)
    url = push.push(made, upload.repository, private=not upload.public, update=upload.update)
    print(f"uploaded: {url}")
    return True


def _summary(
    made: Path,
    shown: Path,
    upload: Upload,
    *,
    missing: Sequence[str],
    faults: Sequence[str],
) -> str:
    files = folder.listing(made)
    total = sum(size for _, size in files)
    lines = [f"folder: {shown}{' (not written: dry run)' if upload.dry_run else ''}"]
    lines += [f"  {name:<36} {size / 1e3:>10,.1f} kB" for name, size in files]
    lines.append(f"  {len(files)} files, {total / 1e6:.1f} MB; sheets beside them stay here")
    if upload.repository:
        kind = "public" if upload.public else "private"
        if upload.update:
            kind = f"{kind} if it is new, else as it is"
        lines.append(f"repository: {upload.repository} ({kind})")
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
