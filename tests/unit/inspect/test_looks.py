"""Looking at pictures: one reading of each file, by threads or by processes, with one result."""

from pathlib import Path

import pytest

from data_tools import examine, pictures, workers
from data_tools.inspect import looks
from data_tools.pictures import PictureError, Probe
from scripts import kindling


def test_processes_and_threads_report_the_same(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "broken.png").write_bytes(b"no picture")
    (root / "broken.txt").write_text("ohwx")
    begun = []
    monkeypatch.setattr(workers, "cores", lambda: 2)
    started = workers.ordered_in_processes
    monkeypatch.setattr(
        workers, "ordered_in_processes", lambda *args: begun.append(1) or started(*args)
    )
    outputs = []
    for least in (100, 1):
        monkeypatch.setattr(looks, "PROCESSES_FROM", least)
        at = [tmp_path / f"{least}.json", tmp_path / f"{least}.html"]
        argv = [str(root), "--resolution", "64", "--json", str(at[0]), "--html", str(at[1])]
        assert kindling.main(["inspect", *argv]) == 2
        page = at[1].read_text(encoding="utf-8")
        outputs.append((at[0].read_text(encoding="utf-8"), page.count("data:image/jpeg")))
    assert begun == [1]
    assert outputs[0] == outputs[1]
    assert "not a picture, or damaged" in outputs[0][0]


def test_a_look_is_of_the_picture_that_the_probe_is_of(root: Path) -> None:
    kept: dict[str, bytes] = {}
    look = looks.Looks(put_thumbnail=kept.__setitem__)
    paths = [root / name for name in ("a.png", "b.png", "c.png", "d.png", "none.png")]
    *found, missing = look(paths)
    assert isinstance(missing, PictureError)
    assert [probe.path for probe in found] == paths[:4]
    for probe in found:
        assert isinstance(probe, Probe)
        assert probe == pictures.probe(probe.path)
        image = pictures.look(probe.path, side=examine.SIDE)[1]
        assert look.measures[probe.sha256] == examine.measure(image)
    assert kept.keys() == look.measures.keys()
    assert len(kept) == 3  # b and c are one file
