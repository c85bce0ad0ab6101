"""`kindling export`: a run, or one of its checkpoints, to an adapter file with its certificate."""

import argparse
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from train import checkpoint, config_load
from train.adapters import certify, export
from train.adapters.write import LAYOUTS
from train.base import DTYPES, LICENCES, Base, resolve
from train.checkpoint import Checkpoint
from train.config import Config
from train.errors import CheckpointError
from train.names import Shape

CONFIG = "config.yaml"


def main(argv: list[str] | None = None) -> int:
    """Export from the command line; 0 if the certificate passes, 1 if it doesn't."""
    parser = argparse.ArgumentParser(prog="kindling export", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, or of one of its checkpoints")
    parser.add_argument(
        "--format",
        type=_layouts,
        default=("diffusers",),
        metavar="LAYOUT,...",
        help=f"any of {', '.join(LAYOUTS)}; default: diffusers, which ComfyUI loads too",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the config's export.dtype")
    parser.add_argument(
        "--output", type=Path, help="default: RUN/NAME.safetensors, NAME-comfyui.safetensors, ..."
    )
    arguments = parser.parse_args(argv)
    run, saved = _find(arguments.run)
    config = config_load.load(run / CONFIG)
    base = resolve(config.base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = arguments.output or run / f"{config.name}.safetensors"
    transformer = base.load_transformer(device, cache=Path(config.cache))
    passed = True
    for layout in arguments.format:
        path = output
        if layout != "diffusers" and (arguments.output is None or len(arguments.format) > 1):
            path = output.with_name(f"{output.stem}-{layout}{output.suffix}")
        certificate = publish(
            config,
            base,
            transformer,
            saved,
            path=path,
            layout=layout,
            dtype=arguments.dtype,
        )
        print(summary(certificate, path))
        passed &= certificate["passed"]
    return 0 if passed else 1


def publish(
    config: Config,
    base: Base,
    transformer: Any,
    saved: Checkpoint,
    *,
    path: Path,
    layout: str = "diffusers",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write a checkpoint's adapter to `path` and its certificate beside it; returns the latter.

    transformer: the base's, without adapters; it is handed back unchanged. layout: one of
    `write.LAYOUTS`. dtype: by default the config's.
    """
    metadata = export.describe(_facts(config, base, transformer, saved), saved.adapter)
    kind = DTYPES[dtype or config.export.dtype]
    export.write(saved.adapter, path, dtype=kind, metadata=metadata, layout=layout)
    pipeline = base.pipeline(transformer=transformer)
    certificate = certify.certify(path, adapter=saved.adapter, pipeline=pipeline)
    certify.write_certificate(certificate, path)
    return certificate


def summary(certificate: dict[str, Any], path: Path) -> str:
    """Two or more lines for the console."""
    size = path.stat().st_size / 1e6
    if certificate["passed"]:
        return (
            f"adapter: {path} ({size:.1f} MB)\n"
            "certificate: loads in diffusers and in ComfyUI at strength 1, every key used"
        )
    reasons = "\n".join(f"  {reason}" for reason in certificate["reasons"])
    return f"adapter: {path} ({size:.1f} MB)\ncertificate: FAILED\n{reasons}"


def _layouts(text: str) -> tuple[str, ...]:
    """Of --format. Raises argparse's error for an unknown one."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in LAYOUTS]:
        raise argparse.ArgumentTypeError(
            f"no layout {unknown[0]!r}; there are {', '.join(LAYOUTS)}"
        )
    return names


def _find(path: Path) -> tuple[Path, Checkpoint]:
    """The run's folder and the checkpoint meant: the one named, or the newest good one."""
    if (path / checkpoint.MANIFEST).is_file():
        return path.parent.parent, checkpoint.load(path)
    if not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path}: not the folder of a run (it has no {CONFIG}) nor of a checkpoint. "
            "A run's folder is OUTPUT/NAME of its config, such as runs/demo."
        )
    newest, faults = checkpoint.newest_good(path / "checkpoints")
    if newest is None:
        raise CheckpointError("\n".join([f"{path}: no good checkpoint to export", *faults]))
    return path, checkpoint.load(newest)


def _facts(config: Config, base: Base, transformer: Any, saved: Checkpoint) -> export.Facts:
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
        config_hash=config_load.digest(config),
        data_hash=saved.progress.origin.data,
        guidance=config.flow.guidance if embedded else None,
        sigma_sampling=sampling,
        training_shift=str(config.flow.shift),
        inference_shift="compute_empirical_mu",
        trigger=", ".join(data.trigger for data in config.sets if data.trigger) or None,
        title=config.export.title,
        author=config.export.author,
        description=config.export.description,
        licence=LICENCES.get(base.name) or LICENCES.get(base.source),
    )
