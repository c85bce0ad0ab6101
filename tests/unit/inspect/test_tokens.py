"""Tokens of captions."""

from pathlib import Path

from tests.unit.inspect.reading import report_of


def test_tokens_are_counted_by_the_base_or_not_at_all(root: Path, tmp_path: Path) -> None:
    config = tmp_path / "x.yaml"

    def facts(model: str) -> dict:
        config.write_text(
            f"name: x\nbase:\n  model: {model}\n  dtype: fp32\ndata:\n  path: {root}\n"
            "  resolution: 64\ntrain:\n  steps: 12\n  batch_size: 2\n"
        )
        return report_of(root, tmp_path, "--config", str(config))

    (root / "a.txt").write_text("ohwx " * 50)
    counted = facts("toy")
    assert counted["tokens"] == {"note": "by the tokenizer of toy", "limit": 32}
    tokens = [record["tokens"] for record in counted["records"]]
    assert tokens[0] > 32 > max(tokens[1:])
    assert [record["name"] for record in counted["records"] if "truncated" in record["marks"]] == [
        "a.png"
    ]
    assert counted["epoch"] == {"batches": 3, "epochs": 4.0}
    missing = facts("nobody/nothing")
    assert missing["tokens"]["note"] == "not counted: nobody/nothing isn't on this machine"
    assert {record["tokens"] for record in missing["records"]} == {None}
