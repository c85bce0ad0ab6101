"""A whole training run: prepare, train, export. The one place that puts the parts together."""

import json
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator

from train import assemble, loop, optim, parallel, resumption, sample, speed
from train.adapters import export_run
from train.checkpoint import Checkpoint, Origin
from train.config import Config, reading
from train.data import Loader
from train.encoding import encode_text, texts
from train.encoding.cache import DIGESTS, FileDigests, key
from train.encoding.prepare import Prepared, PreparedSet, prepare
from train.errors import MachineError, Stopped, bullet_list
from train.files import writing
from train.loading.base import Base, resolve
from train.lora import eva
from train.order import Mixture, Order
from train.planning import automatic
from train.track import Tracker, spread
from train.trainer import Previews, Trainer
from train.validation.validate import Validator
from train.watch import Watch

PACKAGES = ("kindling", "torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")

SHOWN_SIGMAS = 1000
"""Noise levels in the histogram at the start."""

TIMINGS = "timings.json"
"""When each phase of the newest start was over, in Unix seconds; `begin` is when imports were."""


def run(config: Config, *, resume: bool, accept: bool = False) -> None:
    """Do what a config says. Raises UserError where the user must change something.

    resume: go on where an earlier run of this config ended. accept: changed settings and pictures
    are meant.
    """
    ends = {"begin": time.time()}
    accelerator = parallel.accelerator()
    optim.require(config.optim)
    folder = Path(config.output) / config.name
    saved, said = resumption.find(
        folder, config, resume=resume, accept=accept, world=accelerator.num_processes
    )
    base = resolve(config.base)
    speed.require(config.speed, device=accelerator.device, dtype=base.dtype)
    assemble.check_sharded(parallel.sharding(), config)
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
    with _room_on_the_gpu():
        trainer, transformer, undo = _build(
            config, base, prepared, accelerator=accelerator, origin=origin, saved=saved
        )
    if accelerator.is_main_process:
        ends["load"] = time.time()
        (folder / TIMINGS).write_text(json.dumps(ends, indent=1), encoding="utf-8")
    with trainer.wish as wish, _room_on_the_gpu():
        done = loop.fit(
            trainer,
            start=saved.progress.step if saved else 0,
            steps=config.train.steps,
            checkpoint_every=config.train.checkpoint_every,
            preview_every=config.preview.every,
            validate_every=_validate_every(config),
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
    if accelerator.is_main_process or parallel.is_sharded():
        transformer.unload_lora()
        with _place_of_export(folder, main=accelerator.is_main_process) as place:
            chosen = export_run.choose(folder, config.export)
            for layout in export_run.formats_of(config):
                path = export_run.place(Path(place) / f"{config.name}.safetensors", layout)
                certificate = export_run.publish(
                    config, base, transformer, chosen, path=path, layout=layout
                )
                say(export_run.summary(certificate, path))
    accelerator.end_training()


@contextmanager
def _room_on_the_gpu() -> Iterator[None]:
    """Raises MachineError where torch finds none."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = ". ".join(str(error).split(". ")[:2])  # "CUDA out of memory. Tried to allocate ..."
        raise MachineError(
            f"memory: {asked}. Set memory.gradient_checkpointing and memory.resident_blocks to "
            "auto; if they are, set a lower memory.budget_gb. `kindling plan` says what each phase "
            "takes. --resume goes on from the last checkpoint with these settings changed."
        ) from None


def _place_of_export(folder: Path, *, main: bool) -> AbstractContextManager[Path | str]:
    """The run's folder; for the others, who only lend their part of the base, one that goes."""
    return nullcontext(folder) if main else TemporaryDirectory()


def describe(config: Config, base: Base, prepared: Prepared, *, world: int) -> str:
    """What is about to be trained, for the console."""
    train = config.train
    effective = train.batch_size * train.accumulate * world
    passes = _order(config, prepared).passes(train.steps * train.accumulate * world)
    captions = {record.caption for one in prepared.sets for record in one.collection.records}
    lines = [f"base: {base.name} ({base.family.name}, {config.base.dtype})"]
    for one, times in zip(prepared.sets, passes, strict=True):
        lines += _describe_set(one, passes=times)
    if prepared.trial is not None:
        lines += prepared.trial.describe(config.validation, every=_validate_every(config))
    lines += [
        f"steps: {train.steps} of {effective} pictures ({train.batch_size} a batch, "
        f"{train.accumulate} accumulated, {world} process{'es' if world > 1 else ''})",
        f"cache: {prepared.encoded} entries made" if prepared.encoded else "cache: all there",
        encode_text.describe(captions, keys=prepared.keys, cache=prepared.cache),
    ]
    if export_run.weights_of(config) != "last":
        lines.append(f"previews, checks and the export show the {export_run.weights_of(config)}")
    sources = dict(prepared.trial.sources) if prepared.trial else {}
    sources |= {
        r.caption: r.caption_source for one in prepared.sets for r in one.collection.records
    }
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
    lines = [
        f"data: {one.pictures} pictures in {one.data.path}, {passes:.1f} passes; buckets {sizes}"
    ]
    skipped = [f"{fault.path}: {fault.reason}" for fault in collection.faults]
    if skipped:
        lines.append(bullet_list(f"skipped {len(skipped)} pictures:", skipped))
    if collection.notes:
        notes = [f"{note.path}: {note.text}" for note in collection.notes]
        lines.append(bullet_list("notes:", notes))
    return lines


def _validate_every(config: Config) -> int:
    return config.validation.every or config.train.checkpoint_every


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
    device, shape = accelerator.device, base.transformer_files().settings
    sharding = parallel.sharding()
    memory, said = automatic.settle(
        config,
        shape=shape,
        examples=[example.geometry for example in prepared.examples],
        device=device,
        processes=1 if sharding == "none" else accelerator.num_processes,
    )
    if said:
        accelerator.print(said)
    transformer = base.load_transformer(
        device,
        place=memory.place(device),
        cache=prepared.cache.root,
        cut=parallel.cutter(sharding, device),
        main=accelerator.is_local_main_process,
    )
    cache, keys = prepared.cache, prepared.keys
    order = _order(config, prepared)
    loader = Loader(
        prepared.examples,
        empty_text=keys.prompt(""),
        cache=cache,
        flow=config.flow,
        seed=config.seed,
    )
    assembled = assemble.assemble(
        transformer,
        config,
        memory=memory,
        device=device,
        dtype=base.dtype,
        start=saved.start if saved else None,
        first=() if saved else loader.first_batches(order, pictures=eva.PICTURES),
    )
    if sharding != "none":
        accelerator.print(parallel.describe(transformer, sharding))
    settings = config.model_dump(mode="json")
    start = saved.progress.step if saved else 0
    tracker = Tracker(
        folder,
        name=config.name,
        track=config.track,
        settings=settings,
        start=start,
        steps=config.train.steps,
        every=config.train.log_every,
        main=accelerator.is_main_process,
    )
    validator = prepared.trial and Validator(
        prepared.trial,
        cache=cache,
        flow=config.flow,
        levels=config.validation.sigmas,
        batch_size=config.train.batch_size,
        accelerator=accelerator,
    )
    if not start:
        sigmas = loader.first_sigmas(order, count=SHOWN_SIGMAS)
        tracker.sigmas(sigmas)
        accelerator.print(f"sigma {spread(sigmas)}")
    trainer = Trainer(
        config,
        accelerator=accelerator,
        base=base,
        transformer=transformer,
        order=order,
        loader=loader,
        previews=_previews(config, prepared, folder=folder / "previews"),
        tracker=tracker,
        folder=folder,
        origin=origin,
        watch=validator and Watch(validator, tracker=tracker),
        start=assembled.start,
    )
    if saved:
        trainer.restore(saved)
    return trainer, transformer, assembled.undo


def _previews(config: Config, prepared: Prepared, *, folder: Path) -> Previews:
    cache, keys, prompts = prepared.cache, prepared.keys, config.preview.texts
    requests = sample.requests(
        [texts.get(cache, keys.prompt(prompt)) for prompt in prompts],
        config.preview.references,
        preview=config.preview,
        data=config.data,
        seeds=range(len(prompts)),
    )
    return Previews(requests, texts.get(cache, keys.prompt("")), folder)


def _write_facts(folder: Path, config: Config) -> None:
    """The resolved config and what it ran on, beside the run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / export_run.CONFIG).write_text(reading.dump(config), encoding="utf-8")
    extra = optim.PACKAGES.get(config.optim.name)
    packages = (*PACKAGES, extra) if extra else PACKAGES
    facts = {package: version(package) for package in packages}
    facts |= {"python": platform.python_version(), "machine": platform.platform()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    (folder / "versions.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
