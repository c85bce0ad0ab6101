"""A whole training run: prepare, train, export. The one place that puts the parts together."""

import json
import platform
import signal
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from train import (
    assemble,
    checkpoint,
    config_load,
    encode_text,
    loop,
    resumption,
    sample,
    texts,
)
from train.adapters import export_run
from train.base import Base, resolve
from train.cache import DIGESTS, FileDigests, key
from train.checkpoint import Checkpoint, Origin
from train.config import Config
from train.data import Loader
from train.errors import ConfigError, Stopped, bullet_list
from train.files import writing
from train.order import Mixture, Order
from train.prepare import Prepared, PreparedSet, prepare
from train.track import Tracker
from train.trainer import Previews, Trainer

ENGINES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

PACKAGES = ("kindling", "torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")

TIMINGS = "timings.json"
"""When each phase of the newest start was over, in Unix seconds; `begin` is when imports were."""


def run(config: Config, *, resume: bool, accept: bool = False) -> None:
    """Do what a config says. Raises UserError where the user must change something.

    resume: go on where an earlier run of this config ended. accept: changed settings and pictures
    are meant.
    """
    ends = {"begin": time.time()}
    accelerator = _accelerator()
    folder = Path(config.output) / config.name
    saved, said = resumption.find(
        folder, config, resume=resume, accept=accept, world=accelerator.num_processes
    )
    base = resolve(config.base)
    say = accelerator.print
    for line in said:
        say(line)
    prepared = prepare(config, base, accelerator=accelerator)
    ends |= {"data": prepared.read_at, "encode": time.time()}
    say(describe(config, base, prepared, world=accelerator.num_processes))
    with accelerator.main_process_first():
        origin = Origin(data=prepared.digest, base=base_digest(base, prepared))
    pictures = resumption.list_pictures(one.collection for one in prepared.sets)
    if saved:
        for line in resumption.check_origin(
            saved, origin, folder=folder, pictures=pictures, accept=accept
        ):
            say(line)
    accelerator.wait_for_everyone()  # all have read the list before it is replaced
    if accelerator.is_main_process:
        with writing(folder):
            _write_facts(folder, config)
            resumption.write_pictures(folder, pictures)
    accelerator.wait_for_everyone()
    trainer, transformer, undo = _build(
        config, base, prepared, accelerator=accelerator, origin=origin, saved=saved
    )
    if accelerator.is_main_process:
        ends["load"] = time.time()
        (folder / TIMINGS).write_text(json.dumps(ends, indent=1), encoding="utf-8")
    with trainer.wish as wish:
        done = loop.fit(
            trainer,
            start=saved.progress.step if saved else 0,
            steps=config.train.steps,
            checkpoint_every=config.train.checkpoint_every,
            preview_every=config.preview.every,
        )
    trainer.finish()
    undo.close()
    if done < config.train.steps:
        accelerator.end_training()
        cause = wish.signal or signal.SIGTERM  # another process had it
        message = (
            f"{folder}: stopped by {cause.name} after step {done}, which is saved. "
            "The same command with --resume goes on."
        )
        raise Stopped(message if accelerator.is_main_process else "", signal=cause)
    if accelerator.is_main_process:
        transformer.unload_lora()
        newest, _ = checkpoint.newest_good(folder / "checkpoints")
        assert newest is not None
        final = checkpoint.load(newest)
        path = folder / f"{config.name}.safetensors"
        certificate = export_run.publish(config, base, transformer, final, path=path)
        say(export_run.summary(certificate, path))
    accelerator.end_training()


def _accelerator() -> Accelerator:
    """Of accelerate's settings only the processes count; the config has the rest."""
    accelerator = Accelerator(mixed_precision="no")  # base.dtype decides, not a launcher's default
    if accelerator.gradient_accumulation_steps != 1:  # it would scale down every gradient
        raise ConfigError(
            "accelerate's gradient_accumulation_steps is "
            f"{accelerator.gradient_accumulation_steps}: set train.accumulate instead, and launch "
            "without --gradient_accumulation_steps"
        )
    if accelerator.distributed_type not in ENGINES:
        raise ConfigError(
            f"accelerate is configured for {accelerator.distributed_type.value}; Kindling trains "
            "on one device or with plain data parallelism. Choose that in `accelerate config`."
        )
    return accelerator


def describe(config: Config, base: Base, prepared: Prepared, *, world: int) -> str:
    """What is about to be trained, for the console."""
    train = config.train
    effective = train.batch_size * train.accumulate * world
    passes = _order(config, prepared).passes(train.steps * train.accumulate * world)
    captions = {record.caption for one in prepared.sets for record in one.collection.records}
    lines = [f"base: {base.name} ({base.family.name}, {config.base.dtype})"]
    for one, times in zip(prepared.sets, passes, strict=True):
        lines += _describe_set(one, passes=times)
    lines += [
        f"steps: {train.steps} of {effective} pictures ({train.batch_size} a batch, "
        f"{train.accumulate} accumulated, {world} process{'es' if world > 1 else ''})",
        f"cache: {prepared.encoded} entries made" if prepared.encoded else "cache: all there",
        encode_text.describe(captions, keys=prepared.keys, cache=prepared.cache),
    ]
    sources = {r.caption: r.caption_source for one in prepared.sets for r in one.collection.records}
    cut = [
        f"{sources.get(text, 'preview prompt')}: {tokens} tokens, the limit is {limit}"
        for text, (tokens, limit) in prepared.truncated.items()
    ]
    if cut:
        lines.append(bullet_list("too long; the end of these is lost, closing tag included:", cut))
    return "\n".join(lines)


def _describe_set(one: PreparedSet, *, passes: float) -> list[str]:
    """What is trained of a data set, and what was odd about it."""
    collection = one.collection
    sizes = ", ".join(f"{b.geometry} × {b.pictures}" for b in one.plan.buckets)
    count = len(collection.records)
    lines = [f"data: {count} pictures in {one.data.path}, {passes:.1f} passes; buckets {sizes}"]
    skipped = [f"{fault.path}: {fault.reason}" for fault in collection.faults]
    if skipped:
        lines.append(bullet_list(f"skipped {len(skipped)} pictures:", skipped))
    if collection.notes:
        notes = [f"{note.path}: {note.text}" for note in collection.notes]
        lines.append(bullet_list("notes:", notes))
    return lines


def base_digest(base: Base, prepared: Prepared) -> str:
    """Digest of all weights that a run depends on; reads a local transformer once."""
    transformer = base.transformer_files().digest(FileDigests(prepared.cache.root / DIGESTS))
    return key(kind="base", parts=(prepared.keys.vae, prepared.keys.text, transformer))


def _order(config: Config, prepared: Prepared) -> Mixture:
    orders: list[Order] = []
    first = 0
    for one in prepared.sets:
        size, seed = config.train.batch_size, config.seed
        orders.append(Order(one.examples, batch_size=size, seed=seed, first=first))
        first += len(one.examples)
    shares = [
        one.data.share or order.pictures for one, order in zip(prepared.sets, orders, strict=True)
    ]
    return Mixture(orders, shares=shares)


def _build(
    config: Config,
    base: Base,
    prepared: Prepared,
    *,
    accelerator: Accelerator,
    origin: Origin,
    saved: Checkpoint | None,
) -> tuple[Trainer, Any, ExitStack]:
    """The trainer, restored if there is something to restore, its transformer, and the way back
    to a transformer that has an adapter and nothing else."""
    folder = Path(config.output) / config.name
    with accelerator.main_process_first():  # it makes the quantised copy, the others read that
        transformer = base.load_transformer(accelerator.device, cache=prepared.cache.root)
    assembled = assemble.assemble(transformer, config, device=accelerator.device, dtype=base.dtype)
    settings = config.model_dump(mode="json")
    tracker = Tracker(
        folder,
        name=config.name,
        track=config.track,
        settings=settings,
        start=saved.progress.step if saved else 0,
        steps=config.train.steps,
        every=config.train.log_every,
        main=accelerator.is_main_process,
    )
    cache, keys = prepared.cache, prepared.keys
    trainer = Trainer(
        config,
        accelerator=accelerator,
        base=base,
        transformer=transformer,
        order=_order(config, prepared),
        loader=Loader(
            prepared.examples,
            empty_text=keys.prompt(""),
            cache=cache,
            flow=config.flow,
            seed=config.seed,
        ),
        previews=_previews(config, prepared, folder=folder / "previews"),
        tracker=tracker,
        folder=folder,
        origin=origin,
    )
    if saved:
        trainer.restore(saved)
    return trainer, transformer, assembled.undo


def _previews(config: Config, prepared: Prepared, *, folder: Path) -> Previews:
    cache, keys, prompts = prepared.cache, prepared.keys, config.preview.prompts
    requests = sample.requests(
        [texts.get(cache, keys.prompt(prompt)) for prompt in prompts],
        preview=config.preview,
        resolution=max(config.data.resolutions),
        seeds=range(len(prompts)),
    )
    return Previews(requests, texts.get(cache, keys.prompt("")), folder)


def _write_facts(folder: Path, config: Config) -> None:
    """The resolved config and what it ran on, beside the run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / export_run.CONFIG).write_text(config_load.dump(config), encoding="utf-8")
    facts = {package: version(package) for package in PACKAGES}
    facts |= {"python": platform.python_version(), "machine": platform.platform()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    (folder / "versions.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
