"""The benchmark of accuracy: errors by hand, and a small run of all modes."""

import json
from pathlib import Path

import pytest
import torch

from scripts import bench_precision


def test_errors_are_relative_and_by_batch() -> None:
    truth = [(2.0, torch.tensor([3.0, 4.0])), (1.0, torch.tensor([1.0, 0.0]))]
    found = [(2.1, torch.tensor([3.0, 4.5])), (1.0, torch.tensor([1.0, 0.3]))]
    errors = bench_precision.errors(found, truth)
    assert errors["loss"]["samples"] == pytest.approx([0.05, 0.0])
    assert errors["gradient"]["samples"] == pytest.approx([0.1, 0.3])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path: Path = tmp_path_factory.mktemp("precision") / "precision.json"
    arguments = ["--base", "wide", "--heads", "1", "--batches", "1", "--json", str(path)]
    assert bench_precision.main(arguments) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_mode_has_figures_in_the_types_that_tell_something(report: dict) -> None:
    found = report["results"]["wide"]
    assert found.keys() == bench_precision.MODES.keys()
    assert report["machine"]
    assert report["date"]
    for name, by_type in found.items():
        plain = name.startswith("as it is") or "branch in fp32" in name
        assert by_type.keys() == ({"bf16"} if plain else {"bf16", "fp32"}), name


def test_figures_are_of_the_order_that_the_formats_have(report: dict) -> None:
    """4 bits are coarser than 8; our int8 and nf4 are as good as bitsandbytes'; the branch's type
    changes something, and less than the base's does."""
    found = {
        (name, key): figures["gradient"]["median"]
        for name, by_type in report["results"]["wide"].items()
        for key, figures in by_type.items()
    }
    assert all(0 < error < 1 for error in found.values())
    assert found["nf4", "fp32"] > 2 * found["fp8", "fp32"]
    assert found["fp8, products in fp8", "fp32"] > found["fp8", "fp32"]
    assert found["int8", "fp32"] == pytest.approx(
        found["bitsandbytes Linear8bitLt", "fp32"], rel=0.1
    )
    assert found["nf4", "fp32"] == pytest.approx(found["bitsandbytes Linear4bit", "fp32"], rel=0.1)
    base, wide = found["as it is", "bf16"], found["as it is, branch in fp32", "bf16"]
    assert base != wide
    assert base == pytest.approx(wide, rel=0.1)


def test_the_table_has_medians_in_per_cent() -> None:
    spread = {"median": 0.0123, "min": 0.0, "max": 1.0}
    figures = {"bf16": {"loss": spread, "gradient": spread}}
    assert bench_precision.row("toy", "as it is", figures) == (
        *("toy", "as it is", "1.230 %", "1.230 %", "-", "-"),
    )
