"""The folder: what is in it is true, whole and private, and the run stays as it was."""

import base64
import io
import json
import socket
from pathlib import Path

import httpx
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import RemoteEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file

from tests.unit.publishing import made
from train.adapters import files
from train.adapters.files import File
from train.adapters.intent import PEFT_METADATA
from train.commands import publish as command
from train.errors import CheckpointError, ConfigError
from train.publishing import folder, pictures

FILE = "mika.safetensors"
OWN = ["--title", "Mika", "--author", "Studio Ü", "--description", "Our mascot.", "--tags", "a,b"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*arguments: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def published(run: Path, *arguments: str) -> Path:
    command.main([str(run), *arguments])
    return run / "publish"


def snapshot(run: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_metadata_change_in_a_new_file_and_no_bit_of_a_tensor_does(tmp_path: Path) -> None:
    run = made.run(tmp_path)
    before = snapshot(run)
    target = published(run, "--to", str(tmp_path / "out"), *OWN) and tmp_path / "out" / FILE
    assert snapshot(run) == before
    old, new = File(run / FILE), File(target)
    assert files.body_hash(target) == files.body_hash(run / FILE)
    tensors, originals = load_file(target), load_file(run / FILE)
    assert tensors.keys() == originals.keys()
    assert all(tensors[key].equal(originals[key]) for key in tensors)
    assert new.metadata["modelspec.hash_sha256"] == f"0x{files.body_hash(target)}"
    assert new.metadata[PEFT_METADATA] == old.metadata[PEFT_METADATA]
    changed = {k for k in new.metadata if new.metadata[k] != old.metadata.get(k)}
    assert changed == {
        *(f"modelspec.{k}" for k in ("title", "author", "description", "tags", "thumbnail")),
        *("modelspec.license", "ss_num_train_images", "ss_training_comment"),
        "kindling.checkpoint",
    }
    found = {key: new.metadata[f"modelspec.{key}"] for key in ("title", "author", "tags")}
    assert found == {"title": "Mika", "author": "Studio Ü", "tags": "a,b"}
    assert new.metadata["ss_num_train_images"] == "3"


def test_a_certificate_is_of_the_file_beside_it(tmp_path: Path) -> None:
    target = published(made.run(tmp_path, layouts=("diffusers", "kohya")))
    for name in ("mika", "mika-kohya"):
        certificate = json.loads((target / f"{name}.certificate.json").read_text())
        path = target / f"{name}.safetensors"
        assert certificate["file"]["sha256"] == files.file_hash(path)
        assert certificate["file"]["bytes"] == path.stat().st_size
        original = target.parent / f"{name}.safetensors"
        assert certificate["exported"]["sha256"] == files.file_hash(original)


def test_the_thumbnail_is_small_square_and_of_the_subject(tmp_path: Path) -> None:
    target = published(made.run(tmp_path))
    text = File(target / FILE).metadata["modelspec.thumbnail"]
    head, _, data = text.partition(",")
    thumbnail = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (head, thumbnail.format) == ("data:image/jpeg;base64", "JPEG")
    assert thumbnail.size == (64, 64)
    pixel = thumbnail.getpixel((32, 32))
    assert isinstance(pixel, tuple)
    assert pixel[2] > 150 > pixel[0], "the first prompt has no trigger, so it is the second's"


def test_even_noise_makes_a_small_thumbnail(tmp_path: Path) -> None:
    noise = Image.effect_noise((1024, 768), 100).convert("RGB")
    noise.save(tmp_path / "noise.png")
    assert len(pictures.thumbnail(tmp_path / "noise.png")) < 100_000


def test_captions_and_paths_stay_private_unless_asked(tmp_path: Path) -> None:
    run = made.run(tmp_path, base=str(tmp_path / "models" / "my-base"), revision=None)
    (tmp_path / "models" / "my-base").mkdir(parents=True)
    text = made.texts(published(run))
    assert made.SECRET not in text
    assert "ss_tag_frequency" not in text
    assert str(tmp_path) not in text
    assert "my-base" in text
    target = published(run, "--overwrite", "--tag-frequency")
    table = json.loads(File(target / FILE).metadata["ss_tag_frequency"])
    assert table == {"photos": {"mika": 3, made.SECRET: 3, "0": 1, "1": 1, "2": 1}}


@pytest.mark.parametrize(
    ("base", "revision", "shape", "expected"),
    [
        ("black-forest-labs/FLUX.2-dev", "abc", "dev", ("other", "flux-non-commercial-license")),
        ("black-forest-labs/FLUX.2-klein-base-4B", "abc", "klein-4b", ("apache-2.0", None)),
        ("/models/klein9", None, "klein-9b", ("other", "flux-non-commercial-license")),
        ("toy", None, "toy", ("apache-2.0", None)),
        ("/models/own", None, "toy", ("unknown", None)),
    ],
)
def test_the_card_names_base_and_licence(
    base: str, revision: str | None, shape: str, expected: tuple, tmp_path: Path
) -> None:
    target = published(made.run(tmp_path, base=base, revision=revision, shape=shape), *OWN)
    data = ModelCard.load(target / "README.md").data.to_dict()
    assert (data["license"], data.get("license_name")) == expected
    repositories = {
        "/models/klein9": "black-forest-labs/FLUX.2-klein-base-9B",
        "toy": None,
        "/models/own": None,
    }
    repository = repositories.get(base, base)
    assert data.get("base_model") == repository
    assert data.get("base_model_relation") == (repository and "adapter")
    assert data["instance_prompt"] == "mika"
    assert data["library_name"] == "diffusers"
    assert {"lora", "flux2", "text-to-image", "template:sd-lora", "a", "b"} <= {*data["tags"]}
    assert [row["text"] for row in data["widget"]] == ["a street", "mika in the rain"]
    assert all((target / row["output"]["url"]).is_file() for row in data["widget"])


def test_the_card_says_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    text = (published(made.run(tmp_path)) / "README.md").read_text(encoding="utf-8")
    assert "Loss on held-out pictures: 0.2500 ± 0.0200, -0.1250 ± 0.0100 to the base." in text
    assert "| steps | 40 of 50 |" in text
    assert "| pictures | 3 |" in text
    unmeasured = next(line for line in text.splitlines() if "Not measured" in line)
    assert "weren't trained" not in unmeasured
    other = published(made.run(tmp_path / "other", held_out=False)) / "README.md"
    text = other.read_text(encoding="utf-8")
    assert "Loss on trained pictures at fixed noise: 0.2500" in text
    assert "Not measured: the loss on pictures that weren't trained;" in text


def test_a_board_is_taken_over_previews_unless_it_is_old(tmp_path: Path) -> None:
    run = made.run(tmp_path)
    made.compared(run)
    target = published(run)
    assert (target / "board.png").read_bytes() == (run / "compare" / "board.png").read_bytes()
    assert [p.name for p in (target / "samples").iterdir()] == ["00.png"]
    assert (target / "samples" / "00.png").read_bytes() == (
        run / "compare" / "00-01.png"
    ).read_bytes()
    assert "![The same prompts" in (target / "README.md").read_text()
    (run / FILE).touch()
    target = published(run, "--overwrite")
    assert not (target / "board.png").exists()
    assert len(list((target / "samples").iterdir())) == 2


def test_workflows_beside_the_export_go_along(tmp_path: Path) -> None:
    run = made.run(tmp_path)
    (run / "mika.comfyui.json").write_text("{}")
    target = published(run)
    assert (target / "mika.comfyui.json").read_text() == "{}"
    assert "and open `mika.comfyui.json`" in (target / "README.md").read_text()


def test_a_run_without_pictures_says_what_to_run(tmp_path: Path, capsys) -> None:
    run = made.run(tmp_path, prompts=())
    target = published(run)
    assert f'`kindling compare {run}` draws it, with --prompt "..."' in capsys.readouterr().out
    assert "modelspec.thumbnail" not in File(target / FILE).metadata
    assert "<Gallery />" not in (target / "README.md").read_text()


LICENCE = """FLUX [dev] Non-Commercial License v2.0
  b. (the “Attribution Notice”):

“The FLUX [dev] Model is licensed by X.\x20

IN NO EVENT.”
"""


def test_the_licence_of_a_local_base_goes_along_and_gives_the_notice(tmp_path: Path) -> None:
    base = tmp_path / "dev"
    base.mkdir()
    (base / "LICENSE.txt").write_text(LICENCE, encoding="utf-8")
    target = published(made.run(tmp_path, base=str(base), revision=None))
    assert (target / "LICENSE.md").read_text(encoding="utf-8") == LICENCE
    notice = (target / "NOTICE").read_text(encoding="utf-8")
    assert notice.startswith("The FLUX [dev] Model is licensed by X.\nIN NO EVENT.\n")
    assert "is a modified version of this model" in notice
    assert "granted directly by Black Forest Labs Inc." in notice
    card = (target / "README.md").read_text(encoding="utf-8")
    assert "> The FLUX [dev] Model is licensed by X." in card
    assert "FLUX [dev] Non-Commercial License v2.0, that of the base" in card
    assert folder.faults(target) == []


def test_the_hubs_cache_has_the_licence_too(tmp_path: Path) -> None:
    place = tmp_path / "hub" / "models--black-forest-labs--FLUX.2-dev"
    (place / "snapshots" / "abc123").mkdir(parents=True)
    (place / "snapshots" / "abc123" / "LICENSE.md").write_text("FLUX licence of then")
    assert (published(made.run(tmp_path)) / "LICENSE.md").read_text() == "FLUX licence of then"


def test_the_hub_is_asked_for_the_licence_but_not_by_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repository: str, name: str, *, revision: str | None) -> str:
        asked.append((repository, name, revision))
        if name == "LICENSE.md":
            raise RemoteEntryNotFoundError("no", response=httpx.Response(404, request=REQUEST))
        (tmp_path / "licence").write_text("from the hub")
        return str(tmp_path / "licence")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    run = made.run(tmp_path)
    command.main([str(run), "--dry-run"])
    assert asked == []
    assert (published(run) / "LICENSE.md").read_text() == "from the hub"
    repository = "black-forest-labs/FLUX.2-dev"
    assert asked == [(repository, "LICENSE.md", "abc123"), (repository, "LICENSE.txt", "abc123")]


REQUEST = httpx.Request("GET", "https://huggingface.co")


def test_without_its_licence_an_adapter_of_dev_is_not_for_upload(tmp_path: Path, capsys) -> None:
    run = made.run(tmp_path)
    assert command.main([str(run), "--dry-run", "--push", "me/mika"]) == 1
    said = capsys.readouterr().out
    assert "forbids the upload:\n  LICENSE.md isn't there" in said
    assert "2.b: The adapter may be used and passed on for non-commercial purposes only" in said
    with pytest.raises(ConfigError, match=r"isn't uploaded:\n  LICENSE.md isn't there"):
        command.main([str(run), "--push", "me/mika"])
    assert "This FLUX Model is licensed by" in (run / "publish" / "NOTICE").read_text()


def test_an_edited_card_cannot_set_an_adapter_of_dev_free(tmp_path: Path) -> None:
    target = published(made.run(tmp_path))
    card = target / "README.md"
    text = card.read_text().replace("license: other", "license: mit")
    card.write_text(text.replace("license_name: flux-non-commercial-license\n", ""))
    (fault,) = folder.faults(target)
    assert "says license: mit, but an adapter of black-forest-labs/FLUX.2-dev is bound" in fault


def test_faults_of_a_folder(tmp_path: Path) -> None:
    run = made.run(tmp_path, base="/models/own", revision=None, shape="toy")
    target = published(run)
    assert folder.faults(target)[0].startswith("README.md doesn't say the licence")
    card = (target / "README.md").read_text().replace("license: unknown", "license: mit")
    (target / "README.md").write_text(card)
    assert folder.faults(target) == []
    with (target / FILE).open("ab") as file:
        file.write(b"\0")
    assert folder.faults(target) == [f"{FILE} isn't the file that mika.certificate.json is of"]
    (target / "mika.certificate.json").unlink()
    assert folder.faults(target) == [f"{FILE} has no certificate"]
    (target / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(CheckpointError, match=r"README\.md: its first lines"):
        folder.faults(target)


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = made.run(tmp_path, base="toy", revision=None, shape="toy")
    before = snapshot(tmp_path)
    assert command.main([str(run), "--dry-run", "--push", "me/mika", *OWN]) == 0
    assert snapshot(tmp_path) == before
    said = capsys.readouterr().out
    assert "repository: me/mika (private)" in said
    assert "  samples/01.png " in said
    assert "licence: Apache License 2.0" in said
    assert "sheets/" not in said


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    run = made.run(tmp_path, base="toy", revision=None, shape="toy")
    target = published(run)
    (target / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite makes it anew"):
        command.main([str(run)])
    with pytest.raises(ConfigError, match="wasn't made by `kindling publish`"):
        command.main([str(run), "--to", str(run / "previews"), "--overwrite"])
    assert (target / "README.md").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"--title, --tags: .* is taken as it is"):
        command.main([str(target), "--title", "x", "--tags", "y"])
    published(run, "--overwrite")
    assert (target / "README.md").read_text() != "mine"
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".")) == []


def test_a_failure_on_the_way_leaves_the_old_folder(tmp_path: Path, monkeypatch) -> None:
    run = made.run(tmp_path, base="toy", revision=None, shape="toy")
    published(run)
    before = snapshot(run)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.main([str(run), "--overwrite"])
    assert snapshot(run) == before


def edited(run: Path, change: dict) -> None:
    path = run / "mika.certificate.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_what_cannot_be_published(tmp_path: Path) -> None:
    run = made.run(tmp_path, layouts=("diffusers", "comfyui"))

    def error(path: Path = run) -> str:
        with pytest.raises(CheckpointError) as caught:
            command.main([str(path)])
        return str(caught.value)

    assert "not the folder of a run" in error(tmp_path)
    edited(run, {"checkpoint": {"step": 30, "rule": "named", "reason": ""}})
    assert "mika-comfyui.safetensors is of another checkpoint" in error()
    edited(run, {"passed": False, "reasons": ["ComfyUI: ignores a key"]})
    assert "FAILED:\n  ComfyUI: ignores a key" in error()
    edited(run, {"passed": True, "file": {"sha256": "0"}})
    assert "which has changed since" in error()
    (run / "mika.certificate.json").write_text("[]")
    assert "no certificate of mika.safetensors" in error()
    (run / FILE).unlink()
    assert f"`kindling export {run}` writes it" in error()
    assert not (run / "publish").exists()
