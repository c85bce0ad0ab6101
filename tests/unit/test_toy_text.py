"""The toy base's tokenizer."""

from transformers import AutoTokenizer

from scripts.toy import build, text
from tests.runs import ROOT


def test_the_tokenizer_that_is_built_is_the_one_that_is_kept() -> None:
    kept = AutoTokenizer.from_pretrained(ROOT / "scripts/toy/base/tokenizer")
    built = text.new_tokenizer(seed=build.SEED)
    assert built.get_vocab() == kept.get_vocab()
    words = ["A red Circle", "red", "小 fox"]
    assert built(words)["input_ids"] == kept(words)["input_ids"]
