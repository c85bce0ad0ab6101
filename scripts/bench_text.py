"""Memory and seconds of encoding prompts: Kindling's cut text encoder beside the whole one.

`python -m scripts.bench_text [--json FILE]`. Makes a random text encoder of dev's class, 40 layers
in several shards; each side loads it and encodes the same captions in a process of its own. Never
passes or fails.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from scripts import bench_report

SIDES = {
    "whole, bf16": ("whole", "bf16", "none"),
    "cut, bf16": ("cut", "bf16", "none"),
    "whole, fp32": ("whole", "fp32", "none"),
    "cut, fp32": ("cut", "fp32", "none"),
    "cut, nf4": ("cut", "bf16", "nf4"),
    "cut, int8": ("cut", "bf16", "int8"),
}
"""Name -> (encoder, type of its file's weights in memory, quantisation)."""

HEADER = ("encoder", "weights MB", "peak RAM MB over imports", "load s", "s a caption")


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(prog="bench_text", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--captions", type=int, default=8, help="default 8")
    parser.add_argument("--side", choices=SIDES, nargs="+", default=list(SIDES), help="default all")
    options = parser.parse_args(argv)
    report = bench_report.new_report("text", argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "dev"
        _fresh(make_base, folder)
        size = sum(f.stat().st_size for f in (folder / "text_encoder").glob("*.safetensors"))
        results = {}
        for side in options.side:
            results[side] = _fresh(measure, folder, *SIDES[side], options.captions)
            print(f"{side}: {results[side]}", file=sys.stderr, flush=True)
    report["results"] = {"file": size, "captions": options.captions, "sides": results}
    print(f"{size / 1e6:.0f} MB on disk, in bf16")
    print(bench_report.table(HEADER, [_row(side, found) for side, found in results.items()]))
    if options.json:
        bench_report.write(report, options.json)
    return 0


def make_base(folder: Path) -> None:
    """A dev base without transformer and VAE; its encoder has dev's proportions, 512 wide."""
    import torch
    from transformers import Mistral3ForConditionalGeneration

    from scripts.toy import text

    tokenizer = text.new_tokenizer(seed=1)
    tokenizer.model_max_length = 512
    config: Any = text.encoder_config(tokenizer)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    sizes = {"hidden_size": 512, "intermediate_size": 3 * 512, "num_hidden_layers": 40}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    config.text_config.update({**sizes, **heads, "vocab_size": 20_000})
    config.vision_config.update(
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    )
    torch.manual_seed(0)
    encoder: Any = Mistral3ForConditionalGeneration(config)
    encoder.to(torch.bfloat16)
    encoder.save_pretrained(folder / "text_encoder", max_shard_size="50MB")
    tokenizer.save_pretrained(folder / "tokenizer")
    index = {"_class_name": "Flux2Pipeline"}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def measure(folder: Path, side: str, dtype: str, quantize: str, captions: int) -> dict[str, float]:
    """Load and encode in this process, which must be a new one."""
    import bitsandbytes  # noqa: F401  # so that every side's imports count alike
    import torch
    import transformers
    from diffusers import Flux2Pipeline  # noqa: F401

    from train.config import BaseConfig, EncodeConfig
    from train.encoding.encode_text import TextEncoder
    from train.loading.base import Base, resolve
    from train.usage import peak_ram

    base = resolve(BaseConfig(model=str(folder), dtype=dtype))  # pyright: ignore[reportArgumentType]
    prompts = [f"a red circle and {'a blue square ' * (6 + n % 3)}" for n in range(captions)]
    settings = EncodeConfig(text_quantize=quantize)  # pyright: ignore[reportArgumentType]
    imports, begin = peak_ram(), time.perf_counter()
    if side == "whole":

        def load(base: Base, device: torch.device, *, quantize: str) -> Any:
            model_class = transformers.Mistral3ForConditionalGeneration
            return model_class.from_pretrained(base.folder("text_encoder"), dtype=base.dtype)

        setattr(Base, "load_text_encoder", load)  # noqa: B010
    encoder = TextEncoder(base, device=torch.device("cpu"), settings=settings)
    loaded = time.perf_counter()
    with torch.no_grad():
        if side == "whole":
            for prompt in prompts:
                encoder.run([prompt], window=encoder.limit)
        else:
            encoder.pads()
            list(encoder.encode(prompts))
    return {
        "weights": sum(w.nbytes for w in encoder.model.parameters()),
        "ram": peak_ram() - imports,
        "load_seconds": loaded - begin,
        "caption_seconds": (time.perf_counter() - loaded) / captions,
    }


def _fresh(function: Any, *arguments: Any) -> Any:
    """Call it in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _row(side: str, found: dict[str, float]) -> tuple[str, ...]:
    megabytes = (f"{found[key] / 1e6:.0f}" for key in ("weights", "ram"))
    seconds = (f"{found[key]:.2f}" for key in ("load_seconds", "caption_seconds"))
    return side, *megabytes, *seconds


if __name__ == "__main__":
    raise SystemExit(main())
