"""A run, or one of its checkpoints, to an adapter file with its certificate."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from train import checkpoint
from train.adapters import certify, export, usage
from train.checkpoint import Checkpoint
from train.config import Config, ExportConfig, reading
from train.errors import CheckpointError
from train.loading.base import (
    DTYPES,
    LICENCES,
    MAX_TEXT_TOKENS,
    Base,
    max_text_tokens,
    resolve,
)
from train.loading.names import Shape
from train.validation import verdict
from train.validation.verdict import History

CONFIG = "config.yaml"


def export_again(
    path: Path,
    *,
    layouts: Sequence[str] | None,
    output: Path | None,
    changes: dict[str, str | None],
) -> bool:
    """Export a run, or the checkpoint whose folder `path` is, and print what was written.

    layouts: None is `formats_of`'s. output: None is the run's own file. changes: settings in place
    of the config's; None leaves them. Returns whether all certificates pass.
    """
    run, config, chosen = _find(path, changes=changes)
    base = resolve(config.base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = output or run / f"{config.name}.safetensors"
    transformer = base.load_transformer(device, cache=Path(config.cache))
    passed = True
    layouts = layouts or formats_of(config)
    for layout in layouts:
        file = place(target, layout) if output is None or len(layouts) > 1 else target
        certificate = publish(config, base, transformer, chosen, path=file, layout=layout)
        print(summary(certificate, file))
        passed &= certificate["passed"]
    return passed


def formats_of(config: Config) -> tuple[str, ...]:
    """The layouts that diffusers and ComfyUI need: one of DoRA for each, otherwise one for both."""
    return ("diffusers", "comfyui") if config.lora.kind == "dora" else ("diffusers",)


def place(path: Path, layout: str) -> Path:
    """Of a layout's file: the name alone is diffusers'."""
    return path if layout == "diffusers" else path.with_name(f"{path.stem}-{layout}{path.suffix}")


@dataclass(frozen=True)
class Chosen:
    """The checkpoint that is exported, and why it is that one."""

    saved: Checkpoint
    rule: str
    """best, last or named."""
    reason: str
    held_out_loss: float | None = None
    """Of this checkpoint, where pictures are held out and it was checked."""

    def facts(self) -> dict[str, Any]:
        """For the certificate."""
        return {
            "step": self.saved.progress.step,
            "rule": self.rule,
            "reason": self.reason,
            "held_out_loss": self.held_out_loss,
        }


def choose(run: Path, settings: ExportConfig) -> Chosen:
    """The checkpoint of a run that `export.checkpoint` means.

    Raises CheckpointError if none is good, or if the best is insisted on and can't be told or read.
    """
    newest, faults = checkpoint.newest_good(run / "checkpoints")
    if newest is None:
        raise CheckpointError("\n".join([f"{run}: no good checkpoint to export", *faults]))
    last, insists = checkpoint.load(newest), settings.checkpoint == "best"
    history = _history(last)
    best = verdict.best(history.checks) if history else None
    if settings.checkpoint == "last":
        return _named(last, history, rule="last", reason="export.checkpoint is last")
    if history is None or best is None:
        reason = "no checkpoint has a loss on held-out pictures"
        if insists:
            raise CheckpointError(
                f"{run}: export.checkpoint is best, but {reason}. Set it to last."
            )
        return _named(last, history, rule="last", reason=reason)
    try:
        saved = checkpoint.load(checkpoint.path_of(run / "checkpoints", best.step))
    except CheckpointError as error:
        if insists:
            raise
        return _named(last, history, rule="last", reason=f"the best can't be read: {error}")
    first, loss = history.checks[0], f"held-out loss {verdict.summary(best.losses)}"
    if first.step == 0:
        loss += f", {verdict.change(best, since=first):+} to the base"
    reason = f"{loss}; the rule: {verdict.BEST_RULE}"
    return _named(saved, history, rule="best", reason=reason)


def _named(saved: Checkpoint, history: History | None, *, rule: str, reason: str) -> Chosen:
    checks = history.checks if history else ()
    losses = {check.step: check.loss for check in checks}
    return Chosen(saved, rule, reason, losses.get(saved.progress.step))


def _history(saved: Checkpoint) -> History | None:
    """A checkpoint's checks, if they are of held-out pictures."""
    facts = saved.progress.checks
    history = History.of_json(facts) if facts else None
    return history if history and history.held_out else None


def publish(
    config: Config,
    base: Base,
    transformer: Any,
    chosen: Chosen,
    *,
    path: Path,
    layout: str = "diffusers",
) -> dict[str, Any]:
    """Write a checkpoint's adapter to `path`, and beside it its certificate, which is returned, and
    what helps to use it.

    transformer: the base's, without adapters; it is handed back unchanged. layout: one of
    `LAYOUTS`.
    """
    adapter = chosen.saved.shown(config.export.weights)
    metadata = export.describe(_facts(config, base, transformer, chosen), adapter)
    metadata |= export.settings(config)
    dtype = DTYPES[config.export.dtype]
    export.write(
        adapter, path, dtype=dtype, metadata=metadata, layout=layout, transformer=transformer
    )
    pipeline = base.pipeline(transformer=transformer)
    loaders = certify.LOADERS
    if adapter.kind == "dora":  # the names of its magnitudes are known to one of them each
        loaders = ("diffusers",) if layout == "diffusers" else ("comfyui",)
    certificate = certify.certify(path, adapter=adapter, pipeline=pipeline, loaders=loaders)
    certificate["checkpoint"] = chosen.facts()
    certify.write_certificate(certificate, path)
    usage.write(_usage(config, base, transformer, path), path, certificate)
    return certificate


def _usage(config: Config, base: Base, transformer: Any, path: Path) -> usage.Usage:
    shape = Shape.of(transformer)
    trigger = next((data.trigger for data in config.sets if data.trigger), None)
    released = usage.released_as(shape.width, shape.double, shape.single)
    return usage.Usage(
        file=path.name,
        pipeline=base.family.pipeline,
        base=base.name,
        released=released,
        distilled=base.distilled,
        prompt=usage.prompt_for(trigger, config.preview.prompts),
        side=max(config.data.resolutions),
        tokens=MAX_TEXT_TOKENS if released else max_text_tokens(base.load_tokenizer()),
        weights=config.base.transformer,
        revision=base.revision,
    )


def summary(certificate: dict[str, Any], path: Path) -> str:
    """Two or more lines for the console."""
    facts = certificate["checkpoint"]
    lines = f"checkpoint: {facts['rule']}, step {facts['step']}; {facts['reason']}\n"
    lines += f"adapter: {path} ({path.stat().st_size / 1e6:.1f} MB)\n"
    if helps := usage.beside(path):
        lines += f"to use it: {', '.join(help.name for help in helps)}\n"
    if certificate["passed"]:
        loaders = " and in ".join(certify.TITLES[loader] for loader in certificate["for"])
        only = "" if len(certificate["for"]) > 1 else "; for no other loader"
        return f"{lines}certificate: loads in {loaders} at strength 1, every key used{only}"
    reasons = "\n".join(f"  {reason}" for reason in certificate["reasons"])
    return f"{lines}certificate: FAILED\n{reasons}"


def weights_of(config: Config) -> str:
    """Which weights are exported and previewed, in words."""
    if config.optim.name == "schedulefree":
        return "average (schedulefree)"
    if config.train.ema is not None and config.export.weights == "average":
        return f"average (ema {config.train.ema:g})"
    return "last"


def _find(path: Path, *, changes: dict[str, str | None]) -> tuple[Path, Config, Chosen]:
    """The run's folder, its config, and the checkpoint meant: the one named, or `choose`'s.

    changes: settings in place of the config's; None leaves them.
    """
    overrides = [f"{key}={value}" for key, value in changes.items() if value is not None]
    if (path / checkpoint.MANIFEST).is_file():
        run, saved = path.parent.parent, checkpoint.load(path)
        chosen = _named(saved, _history(saved), rule="named", reason="by the user")
        return run, reading.load(run / CONFIG, overrides), chosen
    if not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path}: not the folder of a run (it has no {CONFIG}) nor of a checkpoint. "
            "A run's folder is OUTPUT/NAME of its config, such as runs/demo."
        )
    config = reading.load(path / CONFIG, overrides)
    return path, config, choose(path, config.export)


def _facts(config: Config, base: Base, transformer: Any, chosen: Chosen) -> export.Facts:
    saved = chosen.saved
    shape = Shape.of(transformer)
    embedded = transformer.config.guidance_embeds
    sampling = config.flow.sampling
    if sampling == "logit-normal":
        sampling += f"({config.flow.mean:g}, {config.flow.std:g})"
    return export.Facts(
        name=config.name,
        created=datetime.now(UTC),
        version=version("kindling"),
        base=base.source if base.revision else base.name,
        base_revision=base.revision,
        shape=(shape.width, shape.double, shape.single),
        resolution=max(config.data.resolutions),
        steps=saved.progress.step,
        checkpoint=f"{chosen.rule}: {chosen.reason}",
        held_out_loss=chosen.held_out_loss,
        config_hash=reading.digest(config),
        data_hash=saved.progress.origin.data,
        guidance=config.flow.guidance if embedded else None,
        sigma_sampling=sampling,
        training_shift=str(config.flow.shift),
        inference_shift="compute_empirical_mu",
        trigger=", ".join(data.trigger for data in config.sets if data.trigger) or None,
        title=config.export.title,
        author=config.export.author,
        description=config.export.description,
        weights=weights_of(config),
        licence=LICENCES.get(base.name) or LICENCES.get(base.source),
    )
