"""The new folder of an import: finished in one step, resumable, nobody else's."""

from pathlib import Path

import pytest

from data_tools.exchange import import_data, pack, samples
from tests.unit import hostile
from tests.unit.exchange.data_sets import GOOD, contents, drafts, fails, rich, tar
from train.errors import DataError


def test_somebody_elses_part_folder_is_left_alone(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", *GOOD)
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part/mine.txt").write_text("mine")
    assert "out.part: is there already, and not ours" in fails(path, tmp_path / "out")
    with pytest.raises(DataError, match="not ours"):
        pack.run(rich(tmp_path / "in"), tmp_path / "out")
    assert (tmp_path / "out.part/mine.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["x.parquet", "x.tar"])
def test_a_killed_import_goes_on(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "in"
    for i in range(6):
        hostile.picture(root / f"{i}.png", seed=i)
        (root / f"{i}.txt").write_text(str(i))
    pack.run(root, tmp_path / kind)
    add, added, limit = samples.Folder.add, [], 0

    def until_the_limit(self: samples.Folder, sample: samples.Sample) -> None:
        if len(added) == limit:
            (self.part / sample.draft.name).write_bytes(b"half")  # killed while writing it
            raise KeyboardInterrupt
        added.append(sample.draft.name)
        add(self, sample)

    monkeypatch.setattr(samples.Folder, "add", until_the_limit)
    journal = tmp_path / "out.part" / samples.JOURNAL
    for limit in (0, 3, 5):  # noqa: B007 - the function above reads it
        with pytest.raises(KeyboardInterrupt):
            import_data.run(str(tmp_path / kind), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        journal.write_text(journal.read_text() + '{"row": {"fi')  # and while noting it

    def count(self: samples.Folder, sample: samples.Sample) -> None:
        added.append(sample.draft.name)
        add(self, sample)

    monkeypatch.setattr(samples.Folder, "add", count)
    import_data.run(str(tmp_path / kind), tmp_path / "out")
    assert added == [f"{i}.png" for i in range(6)]
    assert drafts(tmp_path / "out") == drafts(root)
    assert contents(tmp_path / "out") == {
        name: data for name, data in contents(root).items() if name.endswith(".png")
    }
    assert not (tmp_path / "out.part").exists()


def test_an_unfinished_import_of_something_else(tmp_path: Path) -> None:
    bad = tar(tmp_path / "x.tar", *GOOD, ("e.png", b""))
    fails(bad, tmp_path / "out")
    other = tar(tmp_path / "y.tar", *GOOD)
    assert "an unfinished import of other data; remove it first" in fails(other, tmp_path / "out")
    tar(bad, *GOOD)  # mended
    assert "an unfinished import of other data" in fails(bad, tmp_path / "out")


def test_a_part_that_changed(tmp_path: Path) -> None:
    bad = tar(tmp_path / "x.tar", *GOOD, ("e.png", b""))
    fails(bad, tmp_path / "out")
    (tmp_path / "out.part/good.png").write_bytes(b"x")
    assert "good.png: changed since the import was stopped" in fails(bad, tmp_path / "out")
