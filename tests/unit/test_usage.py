"""What a process has held at most."""

from pathlib import Path

import pytest

from train import usage


def test_ram_is_told_where_proc_has_no_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "status"
    monkeypatch.setattr(usage, "Path", lambda _: status)
    status.write_text("Name:\tx\nVmHWM:\t  300 kB\n", encoding="utf-8")
    assert usage.peak_ram() == 300 * 1024
    for text in ("Name:\tx\n", None):
        status.unlink() if text is None else status.write_text(text, encoding="utf-8")
        assert usage.peak_ram() > 10**8
