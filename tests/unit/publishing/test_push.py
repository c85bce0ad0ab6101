"""The upload, against a hub that answers what it is told to."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from tests.unit.publishing import made
from train.commands import publish as command
from train.errors import ConfigError, MachineError
from train.publishing import push


class FakeApi:
    """Keeps what it is asked, and the files that it would get."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.uploads: list[dict[str, Any]] = []

    def create_repo(self, repository: str, **settings: Any) -> str:
        self.created.append({"repository": repository, **settings})
        return f"https://hub/{repository}"

    def upload_folder(self, **settings: Any) -> None:
        folder = Path(settings["folder_path"])
        self.uploads.append(settings | {"card": (folder / "README.md").read_text()})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return fake


def toy(folder: Path) -> Path:
    return made.run(folder, base="toy", revision=None, shape="toy")


def test_private_unless_said_and_without_the_sheets(tmp_path: Path, api: FakeApi, capsys) -> None:
    run = toy(tmp_path)
    assert command.main([str(run), "--push", "me/mika"]) == 0
    assert api.created == [
        {"repository": "me/mika", "repo_type": "model", "private": True, "exist_ok": False}
    ]
    (upload,) = api.uploads
    assert upload["ignore_patterns"] == ["sheets/*"]
    assert 'load_lora_weights("me/mika"' in upload["card"]
    assert "uploaded: https://hub/me/mika" in capsys.readouterr().out


def test_an_edited_folder_is_uploaded_as_it_is(tmp_path: Path, api: FakeApi) -> None:
    run = toy(tmp_path)
    command.main([str(run)])
    card = run / "publish" / "README.md"
    assert "YOUR-NAME/YOUR-REPOSITORY" in card.read_text()
    card.write_text(card.read_text() + "\nMore words of mine.\n")
    command.main([str(run / "publish"), "--push", "me/mika", "--public", "--update"])
    (upload,) = api.uploads
    assert "More words of mine." in upload["card"]
    assert 'load_lora_weights("me/mika"' in upload["card"]
    assert (api.created[0]["private"], api.created[0]["exist_ok"]) == (False, True)


def test_a_dry_run_asks_nobody(tmp_path: Path, api: FakeApi) -> None:
    command.main([str(toy(tmp_path)), "--push", "me/mika", "--dry-run"])
    assert (api.created, api.uploads) == ([], [])


@pytest.mark.parametrize("name", ["mika", "me/mi ka", "me/..", "a/b/c", ""])
def test_a_name_that_cannot_be_one(name: str) -> None:
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        push.check_name(name)


def test_without_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(MachineError, match="not logged in to the hub"):
        push.push(tmp_path, "me/mika", private=True, update=False)


@contextmanager
def hub(answers: dict[str, tuple[int, dict[str, Any]]]) -> Iterator[SimpleNamespace]:
    """A server that answers by the begin of the path; paths that it was asked are kept."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append(self.path)
            found = next((a for path, a in answers.items() if self.path.startswith(path)), None)
            status, body = found or (404, {})
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", asked=asked)
    finally:
        server.shutdown()
        server.server_close()


CREATE = "/api/repos/create"


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "doesn't accept this login. `hf auth login` again"),
        (403, "this login may not write to me. Use a token that may"),
        (409, "me/mika is there already. Choose another name, or --update"),
        (400, "the hub refused me/mika when asked to create it"),
    ],
)
def test_what_the_hub_refuses(
    status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub({CREATE: (status, {"error": "no"})}) as server:
        api = HfApi(endpoint=server.url, token="hf_x")
        with pytest.raises(MachineError, match=said):
            push.push(tmp_path, "me/mika", private=True, update=False, api=api)
    assert server.asked == [CREATE]


def test_what_is_made_stays_if_the_upload_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (tmp_path / "README.md").write_text("x")
    answers = {CREATE: (200, {"url": "https://huggingface.co/me/mika"}), "/api/": (403, {})}
    with hub(answers) as server:
        api = HfApi(endpoint=server.url, token="hf_x")
        with pytest.raises(MachineError, match="this login may not write to me"):
            push.push(tmp_path, "me/mika", private=True, update=False, api=api)
    assert len(server.asked) > 1


def test_no_network_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = HfApi(endpoint="http://127.0.0.1:9", token="hf_x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE is set"):
        push.push(tmp_path, "me/mika", private=True, update=False, api=api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(MachineError, match="the hub can't be reached"):
        push.push(tmp_path, "me/mika", private=True, update=False, api=api)
