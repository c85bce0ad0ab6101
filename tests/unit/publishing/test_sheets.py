"""The sheets for Civitai and LiblibAI, and the licences that they speak of."""

import json
from pathlib import Path

import pytest

from tests.unit.publishing import made
from train.publishing import facts, licences, sheets, terms
from train.publishing.facts import Wishes
from train.publishing.sheets import Sheet

WISHES = Wishes(title="Mika", description="Our <mascot>\n& friend.", tags=("mascot",))


def filled(folder: Path, site: str, **changes) -> dict:
    run = made.run(folder, **changes)
    publication = facts.gather(run, WISHES, online=False)
    sheet = sheets.SHEETS[site](publication, samples=["samples/00.png"])
    tree = json.loads(sheet.as_json())
    for language, end in ((0, "en"), (1, "zh")):
        text = sheet.as_text(language)
        assert all(field["label"][end] in text for field in tree["fields"])
    return {field["key"]: field["value"] for field in tree["fields"]}


@pytest.mark.parametrize(
    ("shape", "name", "uses", "other"),
    [
        ("dev", "Flux.2 D", ["Image"], False),
        ("klein-4b", "Flux.2 Klein 4B-base", ["Image", "RentCivit", "Rent", "Sell"], True),
        ("klein-9b", "Flux.2 Klein 9B-base", ["Image"], False),
    ],
)
def test_civitai(shape: str, name: str, uses: list[str], other: bool, tmp_path: Path) -> None:
    found = filled(tmp_path, "civitai", base=f"/models/{shape}", revision=None, shape=shape)
    assert found["version.baseModel"] == name
    assert (found["allowCommercialUse"], found["allowDifferentLicense"]) == (uses, other)
    assert found["version.trainedWords"] == ["mika"]
    assert found["version.settings.strength"] == 1.0
    assert (found["type"], found["version.steps"]) == ("LORA", 40)
    assert found["tagsOnModels"] == ["flux2", "mascot"]
    english, chinese = found["description"]["en"], found["description"]["zh"]
    assert english.startswith("<p>Our &lt;mascot&gt;<br>&amp; friend.<br>LoRA for ")
    assert "触发词：mika" in chinese
    assert ("This FLUX Model is licensed by" in chinese) is (shape != "klein-4b")


@pytest.mark.parametrize("shape", ["dev", "klein-4b", "toy"])
def test_liblib_says_that_it_is_not_verified(shape: str, tmp_path: Path) -> None:
    found = filled(tmp_path, "liblib", base=f"/models/{shape}", revision=None, shape=shape)
    official = {"dev": "FLUX.2 [dev]", "klein-4b": "FLUX.2 [klein] 4B", "toy": None}
    assert found["base"] == official[shape]
    said = {"dev": "非商用", "klein-4b": "基础模型协议允许商用", "toy": "（请自行填写）"}
    assert said[shape] in found["licence"]["zh"]
    assert found["triggers"] == ["mika"]
    text = sheet_text(tmp_path)
    assert "未经核实" in text


def sheet_text(folder: Path) -> str:
    publication = facts.gather(folder / "runs" / "mika", WISHES, online=False)
    sheet: Sheet = sheets.liblib(publication, samples=[])
    return sheet.as_text(1)


def test_every_duty_is_in_both_languages() -> None:
    for licence in (licences.NON_COMMERCIAL, licences.APACHE):
        assert all(duty.en and duty.zh and duty.section for duty in licence.duties)
        assert licences.of_hub(licence.hub, licence.hub_name) is licence


@pytest.mark.parametrize(
    ("base", "released", "expected"),
    [
        ("dev", None, licences.NON_COMMERCIAL),
        ("black-forest-labs/FLUX.2-klein-9B", None, licences.NON_COMMERCIAL),
        ("black-forest-labs/FLUX.2-klein-4B", None, licences.APACHE),
        ("somebody/finetune", "klein-9b", licences.NON_COMMERCIAL),
        ("somebody/finetune", None, None),
    ],
)
def test_which_licence(base: str, released: str | None, expected: object) -> None:
    assert licences.of(base, released) is expected


def test_our_apache_text_is_whole() -> None:
    text = terms.OURS.read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
