"""What is trained and what is checked: no picture is both, and the settings are obeyed."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator

from data_tools.records import read
from tests import runs
from train import run
from train.config import Config
from train.encoding import prepare
from train.encoding.prepare import Prepared
from train.errors import ConfigError, DataError
from train.loading.base import resolve
from train.validation.split import Split, split

Splitter = Callable[..., Split]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures, of which two look alike and two are the same file."""
    folder = runs.make_pictures(tmp_path_factory.mktemp("many"), sizes=[runs.SQUARE] * 24)
    (folder / "23.png").write_bytes((folder / "22.png").read_bytes())
    return folder


@pytest.fixture
def splitter(tmp_path: Path, many: Path) -> Splitter:
    """Splits a config's sets; `sections` change its settings."""

    def make(*, pictures: Path = many, **sections) -> Split:
        config = config_of(tmp_path, pictures, **sections)
        return split(
            config,
            [read(data, progress=False) for data in config.sets],
            proven=frozenset(),
            memo=tmp_path / "looks.txt",
            accelerator=Accelerator(),
        )

    return make


def config_of(folder: Path, pictures: Path, **sections) -> Config:
    sections = {"validation": {"pictures": "auto"}, **sections}
    return runs.make_config(folder, model=Path("toy"), pictures=pictures, **sections)


def names(found: Split) -> tuple[set[str], set[str]]:
    """Of the trained pictures of the first set, and of the checked ones."""
    return {row.name for row in found.trained[0]}, {row.name for row in found.checked}


def test_nothing_is_trained_and_held_out(splitter, many):
    found = splitter()
    trained, checked = names(found)
    assert found.held_out
    assert len(checked) == 4
    assert len(trained) == 20
    assert not trained & checked
    digests = {row.sha256 for row in found.trained[0]}
    assert not digests & {row.sha256 for row in found.checked}
    assert found.origin == f"4 of the 24 pictures in {many}"


def test_every_start_holds_out_the_same(splitter, many, tmp_path):
    """Also where pictures have other names."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in many.iterdir():
        turned = str(99 - int(path.stem))
        (moved / f"{turned}{path.suffix}").write_bytes(path.read_bytes())
    first, other = splitter(), splitter(pictures=moved, seed=8)
    assert {row.sha256 for row in first.checked} == {row.sha256 for row in other.checked}


def test_too_few_are_trained_whole_and_checked_as_such(splitter, tmp_path):
    few = runs.make_pictures(tmp_path / "few", sizes=[runs.SQUARE] * 19)
    found = splitter(pictures=few)
    trained, checked = names(found)
    assert (len(trained), len(checked), found.held_out) == (19, 8, False)
    assert checked < trained


@pytest.mark.parametrize(
    ("sections", "setting"),
    [
        ({"validation": {"pictures": "held-out"}}, "validation.pictures: held-out"),
        ({"export": {"checkpoint": "best"}}, "export.checkpoint: best"),
    ],
)
def test_settings_that_need_more_pictures_say_so(splitter, tmp_path, sections, setting):
    few = runs.make_pictures(tmp_path / "few", sizes=[runs.SQUARE] * 5)
    with pytest.raises(ConfigError) as caught:
        splitter(pictures=few, **sections)
    assert str(caught.value) == (
        f"{setting} needs 4 pictures to hold out, not more than one in 5 and no near-duplicates of "
        f"trained ones; {few} has 5. Add pictures, give validation.path, or remove the setting."
    )


def test_off_is_off_and_training_holds_none_out(splitter):
    assert splitter(validation={"pictures": "off"}).checked == []
    found = splitter(validation={"pictures": "training", "max_pictures": 5})
    assert (len(found.trained[0]), len(found.checked), found.held_out) == (24, 5, False)


def test_only_the_first_set_is_held_out_of(splitter, tmp_path):
    others = runs.make_pictures(tmp_path / "others", sizes=[runs.WIDE] * 30)
    found = splitter(more_data=({"path": str(others), "resolution": 64},))
    assert [len(rows) for rows in found.trained] == [20, 30]
    assert all("others" not in str(row.target) for row in found.checked)


def test_checked_pictures_are_shown_as_they_are(splitter):
    data = {"flip": True, "caption_dropout": 0.5, "repeats": 3, "loss_weight": 0.5}
    found = splitter(data={**data, "resolution": (64, 96), "max_upscale": 2.0}).checked_as
    assert (found.flip, found.caption_dropout, found.repeats) == (False, 0.0, 1)
    assert (found.loss_weight, found.resolution) == (1.0, 96)


def test_a_folder_of_its_own_is_checked_and_nothing_is_held_out(splitter, tmp_path):
    own = tmp_path / "own"
    for number in range(3):
        runs.draw_picture(own / f"v{number}.png", seed=100 + number)
        (own / f"v{number}.txt").write_text("zibby", encoding="utf-8")
    found = splitter(validation={"pictures": "auto", "path": str(own)})
    assert names(found) == ({f"{n}.png" for n in range(24)}, {f"v{n}.png" for n in range(3)})
    assert found.held_out
    assert found.digest


def test_a_trained_picture_in_that_folder_is_an_error(splitter, many, tmp_path):
    own = runs.make_pictures(tmp_path / "own", sizes=[runs.WIDE] * 2)
    (own / "0.png").write_bytes((many / "7.png").read_bytes())
    with pytest.raises(DataError) as caught:
        splitter(validation={"pictures": "auto", "path": str(own)})
    assert str(caught.value) == (
        f"{own}: these are trained too; take them out of one folder:\n  0.png"
    )


def test_held_out_pictures_are_in_no_batch(tmp_path, dev_folder, many):
    """Of the whole preparation, over an epoch; the report counts them."""
    config = runs.make_config(
        tmp_path,
        model=dev_folder,
        pictures=many,
        data={"repeats": 2, "flip": True},
        validation={"pictures": "auto"},
    )
    base = resolve(config.base)
    found: Prepared = prepare.prepare(config, base, accelerator=Accelerator())
    assert found.trial
    entries = {example.pictures[0] for example in found.trial.examples}
    order = run._order(config, found)
    shown = {
        found.examples[showing.example].pictures[0]
        for position in range(20)
        for showing in order[position]
    }
    assert len(entries) == 4
    assert not shown & entries
    assert len(shown) == len({path.read_bytes() for path in many.glob("*.png")}) - len(entries)
    assert all(example.mirrored is None for example in found.trial.examples)
    report = run.describe(config, base, found, world=1)
    assert f"data: 20 pictures in {many}" in report
    assert re.search(
        rf"validation: held out, never trained: 4 of the 24 pictures in {many}\n"
        r"  52 passes forward every 250 steps\n",
        report,
    )
