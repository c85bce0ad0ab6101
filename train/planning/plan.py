"""`kindling plan`: what a config takes on a machine, before anything is downloaded.

Owns the command and its words. Exit status 0 if the config fits, 2 if not. Goes to no network.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.config import Config
    from train.planning.facts import Facts
    from train.planning.forecast import Forecast, Remedy, Room
    from train.planning.machine import Gpu
    from train.planning.phases import Pictures

GB = 1e9
SIZES = (12, 16, 24, 32, 48, 80, 141)
"""Cards that `--gpu` knows, by the GB that they are sold as."""
SAME = 0.1
"""A difference in time that the estimate can't tell from none."""
PICTURES = 20
"""Assumed where the data folder isn't there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; 0 if the config fits, 2 if not."""
    options = _parser().parse_intermixed_args(argv)
    from train.config import reading

    config = reading.load(options.config, options.overrides)
    from train.planning import facts, forecast, machine
    from train.planning.metered import Meters

    base = facts.of(config.base)
    gpu = machine.CARDS[options.gpu] if options.gpu else machine.at_hand()
    room = _room(config, gpu, elsewhere=options.gpu is not None, processes=options.sharded)
    meters = Meters(base)
    found = forecast.forecast(config, base, _pictures(config), room=room, meters=meters)
    remedy = None if found.fits else forecast.remedy(found, base, room=room, meters=meters)
    print(text(found, base, room=room, remedy=remedy, path=options.config))
    if options.json:
        report = as_json(found, base, room=room, remedy=remedy)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if found.fits else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kindling plan",
        description="What a config takes: GPU memory, RAM, disk and time of each phase. Nothing is "
        "downloaded. Exit status 0 if it fits, 2 if not.",
    )
    parser.add_argument("--config", type=Path, required=True, help="such as configs/dev-24gb.yaml")
    parser.add_argument(
        "--gpu",
        type=int,
        choices=SIZES,
        help="plan for a card of so many GB instead of this machine's",
    )
    parser.add_argument(
        "--sharded",
        type=_processes,
        default=1,
        metavar="N",
        help="the base in parts on so many such cards of one machine, as with "
        "configs/accelerate/fsdp2.yaml or deepspeed.yaml; with ddp.yaml each takes what one does",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, too")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, such as lora.rank=32"
    )
    return parser


def _processes(text: str) -> int:
    """Of --sharded. Raises argparse's error below two."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number of cards from 2 on")
    return int(text)


def _room(config: "Config", gpu: "Gpu | None", *, elsewhere: bool, processes: int) -> "Room":
    """What this machine has; of another one only the card is known."""
    from train.doctor import available_memory
    from train.planning.forecast import Room

    if elsewhere:
        return Room(gpu, None, None, processes)
    output = Path(config.output).absolute()
    place = next(path for path in (output, *output.parents) if path.exists())
    return Room(gpu, available_memory(), shutil.disk_usage(place).free, processes)


def _pictures(config: "Config") -> "Pictures":
    """The largest example and the counts: from the data folders if they are there, else assumed."""
    from data_tools import buckets, records
    from data_tools.buckets import Geometry, reference_geometry
    from train.planning.phases import Pictures

    examples: list[tuple[Geometry, tuple[Geometry, ...]]] = []
    encoded, captions, found = 0, 0, True
    for data in config.sets:
        if not Path(data.path).is_dir():
            found = False
            encoded += PICTURES * len(data.resolutions) * (2 if data.flip else 1)
            captions += PICTURES
            largest = max(data.resolutions)
            pairs = max(
                map(len, config.preview.references), default=0
            )  # edits are drawn, so trained
            square = Geometry(largest, largest)
            examples.append((square, (square,) * pairs))
            encoded += PICTURES * pairs
            continue
        rows = records.read(data).records
        plan = buckets.plan(rows, data=data)
        shown = [row for row in rows for _ in data.resolutions]
        for row, placement in zip(shown, plan.placements, strict=True):
            references = tuple(reference_geometry(*size) for size in row.reference_sizes)
            examples.append((placement.geometry, references))
            encoded += (1 + len(references)) * (2 if data.flip else 1)
        captions += len({row.caption for row in rows})
    target, references = max(
        examples, key=lambda one: one[0].tokens + sum(size.tokens for size in one[1])
    )
    return Pictures(target, references, encoded, captions, found)


def text(
    found: "Forecast", facts: "Facts", *, room: "Room", remedy: "Remedy | None", path: Path
) -> str:
    """The plan for a console."""
    parts = [
        _heading(found, facts, room, path),
        _base(facts),
        _table(found),
        _step(found),
        _verdict(found, remedy),
        _marks(found, room),
    ]
    return "\n\n".join(parts)


def _heading(found: "Forecast", facts: "Facts", room: "Room", path: Path) -> str:
    gpu = room.gpu
    if gpu is None:
        where = "no GPU here: memory is what a GPU would need, times are left out (see --gpu)"
    elif gpu.here:
        where = f"this machine's {gpu.name}, {gpu.free / GB:.1f} of {gpu.total / GB:.1f} GB free"
        where += " (measured)"
    else:
        where = f"a card like the {gpu.name}, {gpu.total / GB:.1f} GB as torch sees it (assumed)"
    lines = [f"{path}: {facts.name} on {where}"]
    if room.processes > 1:
        lines.append(
            f"{room.processes} of them, a part of the base on each: GPU memory is of one, RAM of "
            f"all {room.processes} processes together"
        )
    if found.config.memory.budget_gb is not None:
        lines.append(f"memory.budget_gb: {found.config.memory.budget_gb:g}")
    pictures = found.pictures
    size = " and ".join(map(str, (pictures.target, *pictures.references)))
    source = "read" if pictures.found else f"assumed: {PICTURES}, as a data folder isn't there"
    lines.append(
        f"pictures: {pictures.encoded} to encode, {pictures.captions} captions ({source}); "
        f"largest {size}"
    )
    return "\n".join(lines)


def _base(facts: "Facts") -> str:
    licence = facts.licence or "licence: see its page"
    gate = "; accept it on the hub and `hf auth login` first" if facts.gated else ""
    lines = [f"{facts.source}: {licence}{gate}"]
    for part in facts.parts:
        state = "here" if part.present else "to fetch"
        lines.append(f"  {part.name:<24}{part.size / GB:>8.2f} GB  {state}")
    if facts.fetched:
        from train.planning.phases import DOWNLOAD_RATE

        wait = duration(facts.fetched / DOWNLOAD_RATE)
        lines.append(
            f"  {'together to fetch':<24}{facts.fetched / GB:>8.2f} GB  {wait} at "
            f"{DOWNLOAD_RATE / 1e6:.0f} MB/s"
        )
    return "\n".join(lines)


def _table(found: "Forecast") -> str:
    from train.planning.budget import needed

    rows = [f"{'phase':<22}{'GPU GB':>8}{'RAM GB':>8}{'disk GB':>9}{'time':>9}"]
    for phase in found.phases:
        gpu = f"{needed(phase.gpu) / GB:.1f}" if phase.gpu else "-"
        disk = f"{phase.disk / GB:.2f}" if phase.disk else "-"
        time = "-" if phase.seconds is None else duration(phase.seconds)
        row = f"{phase.name:<22}{gpu:>8}{phase.ram / GB:>8.0f}{disk:>9}{time:>9}  {phase.note}"
        rows.append(row.rstrip())
    return "\n".join(rows)


def _step(found: "Forecast") -> str:
    from train.planning import budget

    need, choice, config = found.decision.need, found.decision.choice, found.config
    adapter = found.metered.parameters
    away = budget.streamed(found.metered, resident=choice.resident)
    lines = [
        f"training step: {_gb(need.held)} held (weights in {_kind(config)}, adapter of "
        f"{adapter / 1e6:.1f}M in fp32, {config.optim.name}), {_gb(need.gpu - need.held)} more at "
        f"most; {_gb(budget.needed(need.gpu))} with context and slack",
        "memory: " + budget.shown(choice, blocks=len(found.metered.blocks)),
    ]
    if away:
        singles = sum(block.single for block in away)
        doubles = len(away) - singles
        lines.append(
            f"streamed: {singles} single and {doubles} double blocks, {_gb(need.ram)} pinned RAM"
        )
    train = next(phase for phase in found.phases if phase.name.startswith("train"))
    if train.seconds is not None:
        steps = config.train.steps
        lines.append(f"time: {train.seconds / steps:.1f} s a step")
    return "\n".join(lines)


def _kind(config: "Config") -> str:
    return config.base.dtype if config.base.quantize == "none" else config.base.quantize


def _verdict(found: "Forecast", remedy: "Remedy | None") -> str:
    from train.planning.budget import needed

    if found.fits and found.limit is None:
        return "Fits this machine's RAM and disk; there is no GPU to compare with."
    if found.fits:
        most = max(needed(phase.gpu) for phase in found.phases if phase.gpu)
        assert found.limit is not None
        return f"It fits: {most / GB:.1f} of {found.limit / GB:.1f} GB of GPU memory at most."
    lines = ["It doesn't fit:", *(f"  {line}" for line in found.lacking)]
    if remedy is None:
        lines.append("No change of settings that a plan knows makes it fit.")
        return "\n".join(lines)
    now = remedy.forecast
    gpu = max(needed(phase.gpu) for phase in now.phases) / GB
    ram = max(phase.ram for phase in now.phases) / GB
    lines.append(
        f"The smallest change that fits, with {gpu:.1f} GB of GPU memory and {ram:.0f} GB of RAM"
        f"{_cost(found, remedy)}:"
    )
    lines += [f"  {line}" for line in yaml_lines(remedy.changes)]
    return "\n".join(lines)


def yaml_lines(changes: Any) -> Iterator[str]:
    """Settings as lines of a config."""
    sections: dict[str, list[str]] = {}
    for name, value in changes.items():
        section, key = name.split(".")
        word = str(value).lower() if isinstance(value, bool) else value
        sections.setdefault(section, []).append(f"  {key}: {word}")
    for section, lines in sections.items():
        yield f"{section}:"
        yield from lines


def _cost(found: "Forecast", remedy: "Remedy") -> str:
    seconds = [
        next(p.seconds for p in one.phases if p.name.startswith("train"))
        for one in (found, remedy.forecast)
    ]
    if seconds[0] is None or seconds[1] is None:
        return ""
    change = seconds[1] / seconds[0] - 1
    return f", {change:+.0%} time a step" if abs(change) > SAME else ", in about the same time"


def _marks(found: "Forecast", room: "Room") -> str:
    from train.planning import budget, machine, phases

    lines = [
        "computed, and not compared with a GPU yet: files by the published shapes; weights, "
        "gradients, activations and operations by the real training code without numbers; a "
        "compiled step counts as an eager one",
        f"assumed, not measured yet: {_gb(budget.CONTEXT)} CUDA context, "
        f"{budget.FRAGMENTATION:.0%} allocator slack, {_gb(phases.PROCESS)} RAM of the process, "
        f"{_gb(phases.LOADING)} more while loading; a margin of {budget.MARGIN:.0%} of the GPU's "
        "memory is left free for that and for other programs",
    ]
    if room.gpu is not None:
        share = machine.SHARE_MEASURED if room.gpu.here else machine.SHARE
        source = "measured" if room.gpu.here else "published (NVIDIA)"
        lines.append(
            f"{source}: {room.gpu.matmul / 1e12:.0f} TFLOP/s of dense bf16 products; times assume "
            f"{share:.0%} of it, and that copies from RAM run beside it"
        )
    return "\n".join(lines)


def as_json(
    found: "Forecast", facts: "Facts", *, room: "Room", remedy: "Remedy | None"
) -> dict[str, Any]:
    """The figures, in bytes and seconds."""
    return {
        "fits": found.fits,
        "lacking": found.lacking,
        "gpu": room.gpu and asdict(room.gpu),
        "limit": found.limit,
        "pictures": asdict(found.pictures),
        "parts": [asdict(part) for part in facts.parts],
        "phases": [asdict(phase) for phase in found.phases],
        "choice": {
            **asdict(found.decision.choice),
            "recomputed": sorted(found.decision.choice.recomputed),
        },
        "need": asdict(found.decision.need),
        "remedy": remedy and dict(remedy.changes),
    }


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
