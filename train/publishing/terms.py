"""The full text of a base's licence, from where it can be had.

Owns looking for it; what it says is `licences`'.
"""

from pathlib import Path

from train.publishing.licences import APACHE, Licence

NAMES = ("LICENSE.md", "LICENSE.txt", "LICENSE")
OURS = Path(__file__).resolve().parents[2] / "LICENSE"
"""The Apache License 2.0."""


def find(
    licence: Licence, *, base: str, repository: str | None, revision: str | None, online: bool
) -> str | None:
    """The text: of a base's own folder, of the hub's cache, else of the hub itself; None if it
    can't be had.

    base: as in the run's config. repository: of the hub, that the base is or has the shape of.
    online: whether the hub may be asked.
    """
    if licence is APACHE:
        return OURS.read_text(encoding="utf-8")
    for path in (Path(base) / name for name in NAMES):
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
    if repository is None:
        return None
    found = _cached(repository, revision) or (_fetched(repository, revision) if online else None)
    return None if found is None else found.read_text(encoding="utf-8", errors="replace")


def _cached(repository: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in NAMES:
        found = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(found, str):
            return Path(found)
    return None


def _fetched(repository: str, revision: str | None) -> Path | None:
    import httpx
    from huggingface_hub import errors, hf_hub_download

    for name in NAMES:
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except errors.RemoteEntryNotFoundError:
            continue  # it has another name there
        except (errors.HfHubHTTPError, OSError, httpx.TransportError):
            return None  # said as a missing file, with what to do
    return None
