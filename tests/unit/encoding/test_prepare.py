"""From a folder to the cache: nothing twice, nothing stale, nothing lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from data_tools import buckets, pictures
from data_tools.buckets import Geometry
from tests import runs
from train import run
from train.config import BaseConfig
from train.data import Loader, Rules
from train.encoding import encode, encode_text, prepare
from train.encoding.cache import Cache, FileDigests
from train.encoding.encode import Picture
from train.encoding.prepare import Prepared
from train.errors import DataError
from train.loading.base import Base, resolve
from train.order import Showing

SMALL = Geometry(32, 32)
Preparing = Callable[..., Prepared]


def prepare_all(root: Path, model: Path, **sections) -> Prepared:
    """Prepare the pictures in root/data into root/cache."""
    config = runs.make_config(root / "run", model=model, pictures=root / "data", **sections)
    return prepare.prepare(config, resolve(config.base), accelerator=Accelerator())


@pytest.fixture(scope="module")
def first_start(tmp_path_factory, dev_folder: Path) -> tuple[Path, Prepared]:
    """Three squares and a wide picture, prepared: the folder and what was returned."""
    root = tmp_path_factory.mktemp("first")
    runs.make_pictures(root / "data", sizes=[runs.SQUARE] * 3 + [runs.WIDE])
    return root, prepare_all(root, dev_folder)


@pytest.fixture
def first(first_start: tuple[Path, Prepared]) -> Prepared:
    """What the first start returned."""
    return first_start[1]


@pytest.fixture
def folder(tmp_path: Path, first_start: tuple[Path, Prepared]) -> Path:
    """A copy of its pictures, and beside them of its cache."""
    shutil.copytree(first_start[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "data"


@pytest.fixture
def prepared(tmp_path: Path, dev_folder: Path, folder: Path) -> Preparing:
    """Prepares `folder` again, with the copied cache."""
    return lambda **sections: prepare_all(tmp_path, dev_folder, **sections)


@pytest.fixture
def no_loading(monkeypatch) -> Callable[..., None]:
    """Makes loading the named parts an error."""

    def forbid(*parts: str) -> None:
        for part in parts:

            def load(*args: object, part: str = part) -> None:
                raise AssertionError(f"{part} was loaded")

            monkeypatch.setattr(Base, f"load_{part}", load)

    return forbid


def test_a_second_start_loads_no_encoder(prepared, first, no_loading):
    assert first.encoded == 4 + 4 + 1, "pictures, captions, the empty prompt"
    no_loading("vae", "text_encoder", "tokenizer")
    second = prepared()
    assert second.encoded == 0
    assert second.examples == first.examples


def test_a_second_start_decodes_changed_pictures_only(prepared, first, folder, monkeypatch):
    looked_at = []
    decode = pictures._decode
    monkeypatch.setattr(
        pictures, "_decode", lambda path, image: (looked_at.append(path), decode(path, image))
    )
    prepared()
    assert looked_at == []
    changed = folder / first.examples[0].name
    runs.draw_picture(changed, seed=99)
    prepared()
    assert set(looked_at) == {changed}


def test_a_changed_picture_is_encoded_anew_and_only_it(prepared, first, folder, no_loading):
    runs.draw_picture(folder / "1.png", seed=99)
    no_loading("text_encoder")
    second = prepared()
    assert second.encoded == 1
    changed = [a.name for a, b in zip(first.examples, second.examples, strict=True) if a != b]
    assert changed == ["1.png"]
    assert first.digest != second.digest


def test_a_changed_caption_is_encoded_anew_and_only_it(prepared, first, folder, no_loading):
    (folder / "1.txt").write_text("another caption", encoding="utf-8")
    no_loading("vae")
    second = prepared()
    assert second.encoded == 1
    changed = [a.name for a, b in zip(first.examples, second.examples, strict=True) if a != b]
    assert changed == ["1.png"]


def test_another_size_encodes_pictures_only(prepared, no_loading):
    no_loading("text_encoder")
    assert prepared(data={"resolution": 80, "max_upscale": 4.0}).encoded == 4


def test_another_preview_encodes_its_prompt_only(prepared, no_loading):
    no_loading("vae")
    assert prepared(preview={"prompts": ("zibby number 1", "new")}).encoded == 1


def test_flips_are_encoded_beside_the_pictures(prepared, first, no_loading):
    no_loading("text_encoder")
    flipped = prepared(data={"flip": True})
    assert flipped.encoded == 4
    for one, two in zip(first.examples, flipped.examples, strict=True):
        assert one.mirrored is None
        assert two.pictures == one.pictures
        assert two.mirrored is not None
        assert not set(two.mirrored) & set(two.pictures)


def test_another_encoder_is_another_entry(first, dev_folder, tmp_path):
    """Even with equal settings: entries are named by the weights' contents."""
    for part in ("vae", "text_encoder"):
        found = resolve(runs.make_config(tmp_path, model=dev_folder, pictures=tmp_path).base)
        file = next(found.folder(part).glob("*.safetensors"))
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        keys = encode.Keys.of(found, digests=FileDigests(tmp_path / "other.json"))
        file.write_bytes(before)
        assert (keys.vae != first.keys.vae) == (part == "vae")
        assert (keys.text != first.keys.text) == (part == "text_encoder")


def test_every_picture_is_there_at_each_resolution_and_shares_the_cache(prepared, first):
    both = prepared(data={"resolution": (64, 80), "max_upscale": 2.0})
    assert both.encoded == 4, "those at 80 are new"
    assert {example.pictures for example in first.examples} < {e.pictures for e in both.examples}
    names = [example.name for example in both.examples]
    assert names == [name for example in first.examples for name in [example.name] * 2]
    counts = {bucket.geometry: bucket.pictures for bucket in both.sets[0].plan.buckets}
    assert counts[Geometry(64, 64)] == counts[Geometry(80, 80)] == 3
    assert sum(counts.values()) == 8


def test_each_data_set_keeps_its_own_rules(prepared, first, tmp_path):
    others = runs.make_pictures(tmp_path / "others", sizes=[(96, 96)] * 2)
    more = {"path": str(others), "resolution": 80, "repeats": 3, "loss_weight": 0.5}
    both = prepared(more_data=(more | {"caption_dropout": 0.0},))
    assert [len(one.examples) for one in both.sets] == [4, 2]
    assert both.examples[:4] == first.examples
    for example in both.examples[4:]:
        assert (example.repeats, example.geometry) == (3, ((80, 80),))
        assert example.rules == Rules(caption_dropout=0.0, weight=0.5, mask_floor=0.1)
    assert both.digest not in {one.collection.digest for one in both.sets}


@pytest.mark.parametrize("kind", ["alpha", "files"])
def test_a_mask_is_cropped_and_mirrored_with_its_picture(prepared, folder, kind):
    """A wide picture, cropped to a square; the mask is the crop has part of its masked left."""
    picture = Image.open(folder / "3.png")
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, (0, 0, 40, picture.height))
    if kind == "alpha":
        picture.putalpha(mask)
        picture.save(folder / "3.png")
    else:
        mask.save(folder / "3.mask.png")
    found = prepared(
        data={"mask": kind, "flip": True, "max_aspect": 1.0, "max_upscale": 2.0, "mask_floor": 0.0}
    )
    example = found.examples[3]
    assert example.mask is not None
    assert example.mask[1] is not None
    straight, mirrored = (found.cache.get(name)["mask"] for name in example.mask)
    assert straight.shape == (4, 4)
    assert torch.equal(straight, mirrored.flip(1))
    # 96 x 48 cropped to its middle 48 columns, 24 to 72: 16 of them are masked in
    assert straight.mean() == pytest.approx(16 / 48, abs=0.02)
    assert (straight[:, 0] > 0.99).all()
    assert (straight[:, 2:] < 0.05).all()
    others = [one.mask for one in found.examples[:3]]
    assert all(others) if kind == "alpha" else others == [None] * 3
    assert all(one.name != "3.mask.png" for one in found.examples)


def test_a_mask_that_the_crop_loses_is_named(prepared, folder):
    mask = Image.new("L", Image.open(folder / "3.png").size, 0)
    mask.paste(255, (0, 0, 10, 48))
    mask.save(folder / "3.mask.png")
    with pytest.raises(DataError) as caught:
        prepared(data={"mask": "files", "max_aspect": 1.0, "max_upscale": 2.0})
    assert str(caught.value) == (
        f"{folder / '3.mask.png'}: its mask leaves nothing of the crop to 64x64"
    )


def test_too_long_captions_are_reported_with_their_file(prepared, folder, tmp_path, dev_folder):
    text = "zibby " + " ".join(str(number) for number in range(60))
    (folder / "2.txt").write_text(text, encoding="utf-8")
    found = prepared(preview={"prompts": ("short", text + "!")})
    assert list(found.truncated) == [text, text + "!"]
    tokens, limit = found.truncated[text]
    assert limit == 32 < tokens
    config = runs.make_config(tmp_path / "run", model=dev_folder, pictures=folder)
    report = run.describe(config, resolve(config.base), found, world=1)
    assert (
        "too long; the end of these is lost, closing tag included:\n"
        f"  2.txt: {tokens} tokens, the limit is 32\n"
        f"  preview prompt: {found.truncated[text + '!'][0]} tokens, the limit is 32"
    ) in report


@pytest.mark.parametrize("base", ["dev_folder", "klein_folder"])
def test_tokens_are_counted_as_the_pipeline_counts_them(base, request):
    """A caption of exactly the limit isn't reported, one more token is."""
    found = resolve(BaseConfig(model=str(request.getfixturevalue(base))))
    tokenizer = found.load_tokenizer()
    limit = tokenizer.model_max_length
    counts = {n: encode_text.count_tokens(found, tokenizer, "?" * n) for n in range(60)}
    for tokens, whole in ((limit, True), (limit + 1, False)):
        prompt = "?" * next(n for n in counts if counts[n] == tokens)
        assert _closing_tag_survives(found, tokenizer, prompt, limit=limit) == whole


def _closing_tag_survives(base: Base, tokenizer, prompt: str, *, limit: int) -> bool:
    """Whether the last token of the whole text is still there in what the encoder is given."""
    captured = {}
    encoder = base.load_text_encoder(torch.device("cpu"))
    encoder.register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(kwargs), with_kwargs=True
    )
    pipeline = base.pipeline(text_encoder=encoder, tokenizer=tokenizer)
    pipeline.encode_prompt(  # pyright: ignore[reportAttributeAccessIssue]
        prompt=prompt, max_sequence_length=limit, text_encoder_out_layers=base.family.text_layers
    )
    last = {"dev": "[/INST]", "klein": "</think>"}[base.family.name]
    return captured["input_ids"][0, -1].item() == tokenizer.convert_tokens_to_ids(last)


def write_metadata(folder: Path, **references: list[str]) -> None:
    """A metadata.jsonl with references for each target."""
    rows = [
        {"file_name": f"{name}.png", "text": "an edit", "references": refs}
        for name, refs in references.items()
    ]
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (64, 64)),
        ((1024, 1024), (1024, 1024)),
        ((95, 79), (80, 64)),  # cut, never enlarged
        ((1600, 1200), (1168, 880)),  # shrunk to 1182 x 886, then cut
    ],
)
def test_references_are_sized_as_the_pipeline_sizes_them(size, expected):
    assert buckets.reference_geometry(*size) == Geometry(*expected)


def test_references_come_from_metadata_into_a_batch(tmp_path, dev_folder, monkeypatch):
    monkeypatch.setattr(buckets, "REFERENCE_AREA", 128 * 128)
    folder = tmp_path / "data"
    for number, size in enumerate([(64, 64), (96, 64), (320, 240)]):
        runs.draw_picture(folder / f"p{number}.png", size=size, seed=number)
    write_metadata(folder, p0=["p1.png", "p2.png"])
    config = runs.make_config(tmp_path / "run", model=dev_folder, pictures=folder)
    found = prepare.prepare(config, resolve(config.base), accelerator=Accelerator())
    (example,) = found.examples
    assert example.geometry == ((64, 64), (96, 64), (144, 96))
    load = Loader(
        found.examples,
        empty_text=None,
        cache=found.cache,
        flow=config.flow,
        seed=0,
    )
    batch = load([Showing(0, 0, 0), Showing(1, 0, 0)])
    assert batch.latents_BDhw.shape == (2, 16, 4, 4)
    assert [r.shape for r in batch.references] == [(2, 16, 4, 6), (2, 16, 6, 9)]


def test_shares_leave_nothing_out_however_late_a_process_starts(tmp_path, first, dev_folder):
    """It sees some of the others' entries and must not shift its share by them."""
    found = resolve(BaseConfig(model=str(dev_folder)))
    cache = Cache(tmp_path)
    wanted = [
        Picture(record.target, record.sha256, SMALL) for record in first.sets[0].collection.records
    ]
    counts = [
        encode.encode_pictures(
            found, wanted, keys=first.keys, cache=cache, device=torch.device("cpu"), share=(rank, 3)
        )
        for rank in (2, 0, 1)
    ]
    assert sum(counts) == len(wanted)
    assert all(first.keys.picture(picture) in cache for picture in wanted)
