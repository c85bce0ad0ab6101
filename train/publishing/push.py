"""Uploading a folder to the Hugging Face Hub, with a sentence for each way in which that can fail.

Owns the hub's answers. The login is the one of `hf auth login`; no token passes through here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.errors import ConfigError, MachineError
from train.publishing.folder import PRIVATE


def check_name(repository: str) -> None:
    """Raises ConfigError unless it is OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        fits = repository.count("/") == 1
    except HFValidationError:
        fits = False
    if not fits:
        raise ConfigError(
            f"--push: {repository!r} can't be the name of a repository. It is OWNER/NAME, of "
            "letters, digits, '-', '_' and '.'."
        )


def push(folder: Path, repository: str, *, private: bool, update: bool, api: Any = None) -> str:
    """Create the repository and upload all but the sheets; the address of its page.

    update: add to a repository that is there, whose visibility stays. api: a
    huggingface_hub.HfApi. Raises MachineError, ConfigError.
    """
    import huggingface_hub

    check_name(repository)
    if api is None:
        if huggingface_hub.get_token() is None:
            raise MachineError(
                "--push: not logged in to the hub. `hf auth login` with a token that may write, "
                "from huggingface.co/settings/tokens."
            )
        api = huggingface_hub.HfApi()
    with _explained(repository, "create it"):
        url = api.create_repo(repository, repo_type="model", private=private, exist_ok=update)
    with _explained(repository, "upload to it; what is there stays, --update tries again"):
        api.upload_folder(
            repo_id=repository,
            repo_type="model",
            folder_path=folder,
            ignore_patterns=[f"{PRIVATE}/*"],
            delete_patterns=["samples/*"] if update else None,  # an earlier version's
            commit_message="Adapter, certificate and card, by kindling publish",
        )
    return str(url)


@contextmanager
def _explained(repository: str, doing: str) -> Iterator[None]:
    import httpx
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise MachineError("--push: HF_HUB_OFFLINE is set. Unset it to upload.") from None
    except errors.HfHubHTTPError as error:
        raise MachineError(f"--push: {_answer(repository, doing, error)}") from None
    except (httpx.TransportError, ConnectionError) as error:
        raise MachineError(
            f"--push: the hub can't be reached ({error or type(error).__name__}). Check the "
            "connection and try again; the folder is ready."
        ) from None


def _answer(repository: str, doing: str, error: Any) -> str:
    status = error.response.status_code if error.response is not None else None
    owner = repository.partition("/")[0]
    if status == 401:
        return "the hub doesn't accept this login. `hf auth login` again."
    if status == 403:
        return (
            f"this login may not write to {owner}. Use a token that may, of a member of {owner}, "
            "with `hf auth login`; `hf auth whoami` says who is logged in."
        )
    if status == 409:
        return (
            f"{repository} is there already. Choose another name, or --update adds this to it "
            "as a new commit."
        )
    return f"the hub refused {repository} when asked to {doing}: {error}"
