"""What is said where the hub can't give what is asked of it."""

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from train.errors import ConfigError, MachineError
from train.loading import hub

REPOSITORY = "someone/FLUX.2-other"


def refusal(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    """As the hub's client raises it."""
    response = httpx.Response(
        403, request=httpx.Request("GET", f"https://huggingface.co/{REPOSITORY}")
    )
    return kind("refused", response=response)


HUB_ANSWERS = {
    "gated": (
        refusal(errors.GatedRepoError),
        f"base.model: {REPOSITORY} is gated. Accept its licence on huggingface.co/{REPOSITORY}, "
        "then log in on this machine with `hf auth login` (or set HF_TOKEN).",
    ),
    "missing": (
        refusal(errors.RepositoryNotFoundError),
        f"base.model: {REPOSITORY} isn't on the hub, or is private and this login can't see it. "
        f"Check its name on huggingface.co/{REPOSITORY}, and `hf auth login`.",
    ),
    "revision": (
        refusal(errors.RevisionNotFoundError),
        f"base.model: {REPOSITORY} has no such base.revision; "
        f"its revisions are listed on huggingface.co/{REPOSITORY}.",
    ),
    "no index": (
        refusal(errors.RemoteEntryNotFoundError),
        f"base.model: {REPOSITORY} has no model_index.json. It must be a whole diffusers "
        f"repository; what it holds is listed on huggingface.co/{REPOSITORY}.",
    ),
    "offline": (
        errors.LocalEntryNotFoundError("not cached"),
        f"base.model: {REPOSITORY} isn't on this machine and the hub can't be reached. Connect "
        "once, or unset HF_HUB_OFFLINE, or give base.model a local diffusers folder.",
    ),
    "other": (
        refusal(errors.HfHubHTTPError),
        f"base.model: the hub refused {REPOSITORY}: refused. `kindling doctor` checks the login.",
    ),
}


@pytest.mark.parametrize(("error", "message"), HUB_ANSWERS.values(), ids=HUB_ANSWERS)
def test_what_the_hub_answers(error, message):
    def download() -> str:
        raise error

    with pytest.raises(MachineError) as caught:
        hub.fetch(REPOSITORY, download)
    assert str(caught.value) == message


def test_a_file_that_a_repository_lacks_is_named(monkeypatch):
    asked = []

    def lacks(*arguments: object, revision: str | None) -> str:
        asked.append((*arguments, revision))
        raise refusal(errors.RemoteEntryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lacks)
    with pytest.raises(MachineError, match=r"has no transformer/config\.json"):
        hub.fetch_file(REPOSITORY, "transformer/config.json", "abc")
    assert asked == [(REPOSITORY, "transformer/config.json", "abc")]


def test_a_file_that_is_there_is_a_path(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: "/hub/file")
    assert hub.fetch_file(REPOSITORY, "model_index.json", None) == "/hub/file"


def test_a_name_that_no_repository_can_have():
    with pytest.raises(ConfigError, match="no hub repository can have that name"):
        hub.fetch_file("two words/FLUX", "model_index.json", None)


def test_errors_of_ours_pass_through():
    """Only the hub's own are explained."""

    def download() -> str:
        raise AssertionError("ours")

    with pytest.raises(AssertionError, match="ours"):
        hub.fetch(REPOSITORY, download)
