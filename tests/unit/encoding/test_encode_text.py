"""Encoding prompts: what is shared, what is left out, and what happens when that isn't true."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import damage, runs
from train import objective
from train.batch import Batch
from train.config import BaseConfig, EncodeConfig, FlowConfig
from train.data import Example, Loader, Showing
from train.encoding import encode_text, texts
from train.encoding.cache import Cache, FileDigests
from train.encoding.encode import Keys
from train.encoding.encode_text import TextEncoder
from train.errors import MachineError
from train.loading.base import Base, resolve

CPU = torch.device("cpu")
LIMIT = 128
PROMPTS = ("", "a", "b", "a red circle", "blue " * 8, "x " * 40, "y " * 160)
"""Four that fit into the shortest window, 16; one that is cut off."""


def encode(base: Base, root: Path, prompts: Sequence[str] = PROMPTS, **settings: Any) -> list:
    """The cache, the keys and how many were made."""
    cache = Cache(root)
    digests = FileDigests(root / "digests.json")
    keys = Keys.of(base, digests=digests, settings=EncodeConfig(**settings))
    made = encode_text.encode_prompts(base, prompts, keys=keys, cache=cache, device=CPU)
    return [cache, keys, made]


@lru_cache
def whole(base: Base, prompts: tuple[str, ...] = PROMPTS, *, attention: str = "sdpa") -> list:
    """The pipeline's embeddings, prompt by prompt, with every pad."""
    tokenizer, encoder = base.load_tokenizer(), base.load_text_encoder(CPU)
    encoder.set_attn_implementation(attention)
    pipeline: Any = base.pipeline(text_encoder=encoder, tokenizer=tokenizer)
    limit = tokenizer.model_max_length
    with torch.no_grad():
        return [
            pipeline.encode_prompt(prompt, max_sequence_length=limit)[0][0] for prompt in prompts
        ]


def assert_same(cache: Cache, keys: Keys, expected: list) -> None:
    """Entries and embeddings, to the bit."""
    for prompt, embedding in zip(PROMPTS, expected, strict=True):
        assert torch.equal(texts.get(cache, keys.prompt(prompt)), embedding), prompt


@pytest.fixture(scope="module")
def dev(dev_folder, tmp_path_factory) -> Base:
    """The tiny dev base, in fp32, with longer prompts: bits differ in windows of 4 and 8."""
    folder = tmp_path_factory.mktemp("base") / "dev"
    shutil.copytree(dev_folder, folder)
    path = folder / "tokenizer" / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "model_max_length": LIMIT}), encoding="utf-8")
    return resolve(BaseConfig(model=str(folder), dtype="fp32"))


@pytest.fixture
def klein(klein_folder) -> Base:
    """The tiny klein base, in fp32."""
    return resolve(BaseConfig(model=str(klein_folder), dtype="fp32"))


@pytest.fixture
def windows(monkeypatch) -> list[int]:
    """Positions of each run of the text encoder."""
    ran: list[int] = []
    run = TextEncoder.run

    def recorded(self: TextEncoder, prompts: list[str], *, window: int) -> torch.Tensor:
        ran.append(window)
        return run(self, prompts, window=window)

    monkeypatch.setattr(TextEncoder, "run", recorded)
    return ran


def test_devs_pads_are_the_same_for_every_prompt(dev):
    """They see nothing: not the prompt, not each other."""
    tokenizer = dev.load_tokenizer()
    counts = [encode_text.count_tokens(dev, tokenizer, prompt) for prompt in PROMPTS]
    embeddings = whole(dev)
    block = embeddings[0][: LIMIT - counts[0]]
    for embedding, count in zip(embeddings, counts, strict=True):
        pads = max(0, LIMIT - count)
        assert torch.equal(embedding[:pads], block[:pads])
    assert len({pads for pads in counts if pads < LIMIT}) > 3


def test_kleins_pads_depend_on_the_prompt_and_are_kept(klein, tmp_path):
    """They come after it and see it; so there is nothing to share, and entries are whole."""
    tokenizer = klein.load_tokenizer()
    counts = [encode_text.count_tokens(klein, tokenizer, prompt) for prompt in PROMPTS[:4]]
    one, two = whole(klein, ("a", "b"))
    first = max(counts[1:3])
    assert not any(torch.equal(a, b) for a, b in zip(one[first:], two[first:], strict=True))
    assert len(torch.unique(one[counts[1] :], dim=0)) == len(one) - counts[1]
    cache, keys, _ = encode(klein, tmp_path)
    assert_same(cache, keys, whole(klein))
    assert cache.get(keys.prompt("a"))["text"].shape == one.shape
    line = encode_text.describe(PROMPTS, keys=keys, cache=cache)
    assert re.fullmatch(r"text cache: 7 captions, (0.02\d) MB each", line), line


def test_an_entry_has_its_prompts_rows_and_the_pads_are_there_once(dev, tmp_path, windows):
    cache, keys, made = encode(dev, tmp_path)
    assert made == 7
    assert windows.count(16) == 2, "a proof, and the four shortest prompts in one run"
    tokenizer = dev.load_tokenizer()
    for prompt in PROMPTS:
        tokens = encode_text.count_tokens(dev, tokenizer, prompt)
        assert len(cache.get(keys.prompt(prompt))["text"]) == min(tokens, LIMIT)
    blocks = {cache.notes(keys.prompt(prompt)).get("pads") for prompt in PROMPTS}
    assert len(blocks) == 2, "one block, and None for the prompt that is cut off"
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 7 + 1
    assert_same(cache, keys, whole(dev))
    line = encode_text.describe(PROMPTS, keys=keys, cache=cache)
    assert re.fullmatch(r"text cache: 7 captions, 0.02\d MB each; pads once, 0.07\d MB", line), line


def test_pads_that_are_not_the_shared_ones_are_kept_and_counted(dev, tmp_path, monkeypatch):
    """transformers' eager attention lets a masked row see everything a little."""
    load = Base.load_text_encoder

    def eager(self: Base, device: torch.device, *, quantize: str) -> Any:
        encoder = load(self, device, quantize=quantize)
        encoder.set_attn_implementation("eager")
        return encoder

    with monkeypatch.context() as patch:
        patch.setattr(Base, "load_text_encoder", eager)
        cache, keys, _ = encode(dev, tmp_path)
    assert_same(cache, keys, whole(dev, attention="eager"))
    line = encode_text.describe(PROMPTS, keys=keys, cache=cache)
    assert line.endswith("; 5 with pads of their own, which weren't the shared ones")


def test_a_short_run_that_changes_bits_is_not_used(dev, tmp_path, monkeypatch, windows):
    """As another kernel for another shape might; here the positions are off by one."""
    cut = TextEncoder._cut

    def off_by_one(self: TextEncoder, module: Any, args: tuple, inputs: dict) -> tuple:
        args, inputs = cut(self, module, args, inputs)
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"] - 1
        return args, inputs

    monkeypatch.setattr(TextEncoder, "_cut", off_by_one)
    cache, keys, _ = encode(dev, tmp_path)
    tried = [window for window in windows if window < LIMIT]
    assert len(tried) == len(set(tried)) > 0, "each once, to find out"
    assert_same(cache, keys, whole(dev))


def test_a_prompt_whose_short_run_has_other_pads_runs_again_whole(dev, tmp_path, monkeypatch):
    """The proof is the empty prompt's; what if it held for that one only?"""
    run = TextEncoder.run

    def tainted(self: TextEncoder, prompts: list[str], *, window: int) -> torch.Tensor:
        rows = run(self, prompts, window=window)
        if window < LIMIT and any(prompts):
            rows[:, 0] += 1
        return rows

    monkeypatch.setattr(TextEncoder, "run", tainted)
    cache, keys, _ = encode(dev, tmp_path)
    assert_same(cache, keys, whole(dev))
    assert "with pads of their own" in encode_text.describe(PROMPTS, keys=keys, cache=cache)


def test_a_lost_block_is_made_anew_with_its_entries(dev, tmp_path):
    cache, keys, _ = encode(dev, tmp_path)
    block = cache.path(cache.notes(keys.prompt("a"))["pads"])
    damage.truncate(block)
    _, _, made = encode(dev, tmp_path)
    assert made == 6, "the one that is cut off has no pads"
    assert_same(Cache(tmp_path), keys, whole(dev))


def test_nothing_that_is_not_finite_is_stored(dev, tmp_path, monkeypatch):
    load = Base.load_text_encoder

    def broken(self: Base, device: torch.device, *, quantize: str) -> Any:
        encoder = load(self, device, quantize=quantize)
        encoder.get_parameter("embed_tokens.weight")[3] = float("nan")
        return encoder

    monkeypatch.setattr(Base, "load_text_encoder", torch.no_grad()(broken))
    with pytest.raises(MachineError, match="the text encoder's output isn't finite"):
        encode(dev, tmp_path)
    assert not list(tmp_path.glob("*/*"))


def test_the_phase_says_its_time_and_memory(dev, tmp_path, capsys):
    encode(dev, tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "encode" in line]
    head, tail = line.split(" s, peak ")
    assert head.startswith("encode captions: 7 in ")
    amount, unit = tail.split(" ", 1)
    assert unit == "GB RAM"
    assert 0.1 < float(amount) < 20
    encode(dev, tmp_path)
    assert "encode" not in capsys.readouterr().out, "nothing to do, nothing to say"


def test_settings_that_change_embeddings_change_the_key(dev, tmp_path):
    digests = FileDigests(tmp_path / "digests.json")
    changes = [{}, {"text_quantize": "int8"}, {"text_quantize": "nf4"}, {"text_storage": "8bit"}]
    keys = [Keys.of(dev, digests=digests, settings=EncodeConfig(**change)) for change in changes]
    assert len({key.prompt("a") for key in keys}) == len(changes)
    assert len({key.vae for key in keys}) == 1


def batch_of(base: Base, cache: Cache, entries: list[str]) -> Batch:
    """Read by the trainer's own loader, with the noise that the seed says."""
    cache.put("ff00", {"latents": torch.ones(16, 4, 4)}, notes={})
    examples = [
        Example(str(i), ("ff00",), None, name, ((64, 64),)) for i, name in enumerate(entries)
    ]
    load = Loader(examples, empty_text=None, cache=cache, flow=FlowConfig(), seed=3)
    return load([Showing(0, number, 0) for number in range(len(entries))])


def loss_of(base: Base, batch: Batch) -> torch.Tensor:
    """The training loss by picture."""
    transformer = base.load_transformer(CPU)
    guidance = 1.0 if base.family.name == "dev" else None
    return objective.losses(transformer, batch, dtype=base.dtype, guidance=guidance)


@pytest.mark.parametrize("family", ["dev", "klein"])
def test_the_training_loss_is_that_of_whole_entries(family, request, tmp_path):
    base = request.getfixturevalue(family)
    cache, keys, _ = encode(base, tmp_path)
    for number, embedding in enumerate(whole(base)):
        cache.put(f"ee{number}", {"text": embedding}, notes={})
    compact = batch_of(base, cache, [keys.prompt(prompt) for prompt in PROMPTS])
    as_ever = batch_of(base, cache, [f"ee{number}" for number in range(len(PROMPTS))])
    assert torch.equal(compact.text_BLJ, as_ever.text_BLJ)
    assert torch.equal(loss_of(base, compact), loss_of(base, as_ever))


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    """Error by root mean squares."""
    return ((found.float() - true.float()).norm() / true.float().norm()).item()


@pytest.mark.parametrize("family", ["dev", "klein"])
def test_the_error_of_eight_bits(family, request, tmp_path):
    """Of embeddings about 0.6 %, of what the tiny model makes of them far less."""
    base = request.getfixturevalue(family)
    full, eight = (
        batch_of(base, cache, [keys.prompt(prompt) for prompt in PROMPTS])
        for cache, keys, _ in (
            encode(base, tmp_path / storage, text_storage=storage) for storage in ("full", "8bit")
        )
    )
    assert 0.001 < relative(eight.text_BLJ, full.text_BLJ) < 0.008
    transformer = base.load_transformer(CPU)
    guidance = 1.0 if family == "dev" else None
    velocities = [
        objective.predict(transformer, batch, dtype=base.dtype, guidance=guidance)
        for batch in (eight, full)
    ]
    assert 0 < relative(*velocities) < 0.004


KILLED = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from train.encoding import encode_text
from train.loading.base import resolve
from train.encoding.cache import Cache, FileDigests
from train.config import BaseConfig
from train.encoding.encode import Keys

model, root, prompts = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
base = resolve(BaseConfig(model=model, dtype="fp32"))
keys = Keys.of(base, digests=FileDigests(root / "digests.json"))
replace, done = os.replace, []

def replace_or_hang(source, target):
    if str(target).endswith(".safetensors"):
        if len(done) == 4:  # amid the fifth write: its file is there, unnamed
            print("now", flush=True)
            sys.stdin.read()
        done.append(target)
    replace(source, target)

os.replace = replace_or_hang
cpu = torch.device("cpu")
encode_text.encode_prompts(base, prompts, keys=keys, cache=Cache(root), device=cpu)
"""


def test_killed_and_started_again_it_goes_on(dev, tmp_path):
    """kill -9 amid a write: what was done stays, the rest is made, and all of it is whole."""
    command = [sys.executable, "-c", KILLED, dev.source, str(tmp_path), json.dumps(PROMPTS)]
    with subprocess.Popen(
        command, cwd=runs.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "now\n" in iter(process.stdout.readline, "")
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert len(list(tmp_path.glob("*/*.part"))) == 1
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.safetensors")}
    assert len(written) == 4, "the pads and three prompts"
    cache, keys, made = encode(dev, tmp_path)
    assert made == len(PROMPTS) - 3
    assert all(path.stat().st_mtime_ns == then for path, then in written.items())
    assert_same(cache, keys, whole(dev))


def test_a_share_does_not_depend_on_what_the_others_have_done(dev, tmp_path):
    """Three processes, the last first: each makes its own, none twice, and the pads are one."""
    digests, cache = FileDigests(tmp_path / "digests.json"), Cache(tmp_path)
    keys = Keys.of(dev, digests=digests)
    made = [
        encode_text.encode_prompts(
            dev, PROMPTS, keys=keys, cache=cache, device=CPU, share=(rank, 3)
        )
        for rank in (2, 0, 1)
    ]
    assert made == [2, 3, 2]
    assert len(list(tmp_path.glob("*/*.safetensors"))) == len(PROMPTS) + 1
    assert_same(cache, keys, whole(dev))
