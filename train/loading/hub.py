"""Fetching from the hub, with a sentence for each way in which that can fail."""

from collections.abc import Callable

from train.errors import ConfigError, MachineError


def fetch_file(repository: str, name: str, revision: str | None) -> str:
    """One file of a repository: its local path."""
    from huggingface_hub import hf_hub_download

    def download() -> str:
        return hf_hub_download(repository, name, revision=revision)

    return fetch(repository, download, file=name)


def fetch(repository: str, download: Callable[[], str], *, file: str = "model_index.json") -> str:
    """Run a download and say what to do where it can't.

    Raises ConfigError for a name that can't be one and MachineError for all else.
    """
    from huggingface_hub import errors

    page = f"huggingface.co/{repository}"
    try:
        return download()
    except errors.GatedRepoError:
        problem = (
            f"{repository} is gated. Accept its licence on {page}, then log in on this machine "
            "with `hf auth login` (or set HF_TOKEN)."
        )
    except errors.RevisionNotFoundError:
        problem = f"{repository} has no such base.revision; its revisions are listed on {page}."
    except errors.RepositoryNotFoundError:
        problem = (
            f"{repository} isn't on the hub, or is private and this login can't see it. "
            f"Check its name on {page}, and `hf auth login`."
        )
    except errors.HFValidationError:
        raise ConfigError(
            f"base.model: there is no folder {repository}, and no hub repository can have that name"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        problem = (
            f"{repository} isn't on this machine and the hub can't be reached. Connect once, or "
            "unset HF_HUB_OFFLINE, or give base.model a local diffusers folder."
        )
    except errors.RemoteEntryNotFoundError:
        problem = (
            f"{repository} has no {file}. It must be a whole diffusers repository; "
            f"what it holds is listed on {page}."
        )
    except errors.HfHubHTTPError as error:
        problem = f"the hub refused {repository}: {error}. `kindling doctor` checks the login."
    raise MachineError(f"base.model: {problem}")
