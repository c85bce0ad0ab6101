"""The architecture as a test: imports go downward only, and every module has a layer.

The three tables below are the architecture; a new module gets its line here first. Imports inside
functions and under TYPE_CHECKING count. Only our own modules are looked at.
"""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS = {
    0: [
        *("train", "data_tools", "train.errors"),
        *("train.loading", "train.planning", "train.memory", "train.validation"),
        *("train.publishing", "train.encoding"),
        *("train.generate", "train.commands", "train.adapters"),
    ],
    1: [
        *("train.config.schema", "train.config.adapter", "train.config.machine"),
        *("train.config.watch", "train.config"),
        *("train.config.reading", "train.config.wording", "train.config.yaml_text"),
        "train.loading.shapes",
    ],
    2: [
        *(
            "train.flow",
            "train.latents",
            "train.batch",
            "train.files",
            "train.encoding.cache",
            "train.loading.names",
            "train.loading.stored",
            "train.loading.hub",
            "train.encoding.texts",
            "train.usage",
            "train.planning.meter",
            "train.planning.machine",
            "train.randomness",
            "train.order",
            "train.board",
            "train.generate.gallery",
            "train.generate.wishes",
            "train.validation.verdict",
            "train.interrupt",
            "train.memory.transfer",
            "train.zero3",
        ),
        *("data_tools.formats", "data_tools.buckets", "data_tools.pictures", "data_tools.captions"),
        *("data_tools.folder", "data_tools.drafts", "data_tools.tables", "data_tools.sidecars"),
        *("data_tools.sources", "data_tools.masks", "data_tools.records", "data_tools.workers"),
        *("data_tools.examine", "data_tools.holdout"),
        *("data_tools.caption", "data_tools.curate", "data_tools.exchange", "data_tools.inspect"),
        *("data_tools.caption.answers", "data_tools.caption.files", "data_tools.caption.journal"),
        *("data_tools.caption.instructions", "data_tools.caption.captioners"),
        *("data_tools.curate.recipe", "data_tools.curate.selection"),
        *("data_tools.curate.crops", "data_tools.curate.saliency"),
        *("data_tools.exchange.samples", "data_tools.exchange.containers"),
        "data_tools.exchange.tars",
    ],
    3: [
        *("train.loading.base", "train.loading.packed"),
        *("train.encoding.encode", "train.encoding.encode_text", "train.lora", "train.data"),
        "train.lora.*",
        "train.average",
        *(
            "train.optim",
            "train.speed",
            "train.memory.offload",
            "train.memory.recompute",
            "train.parallel",
        ),
        *("train.checkpoint", "train.track", "train.trackers"),
        *(
            "train.loading.frozen",
            "train.loading.weights",
            "train.loading.kept",
            "train.loading.transformer",
        ),
        *("train.adapters.files", "train.adapters.updates"),
        *("train.adapters.comfyui", "train.adapters.layouts", "train.adapters.intent"),
        *("train.adapters.source", "train.adapters.opening"),
        *("train.adapters.write", "train.adapters.export", "train.adapters.workflow"),
    ],
    4: [
        *("train.objective", "train.sample", "train.validation.split", "train.planning.facts"),
        "train.adapters.bounds",
        *("train.adapters.certify", "train.adapters.skeleton", "train.adapters.loaders"),
        *("train.adapters.page", "train.adapters.bake", "train.adapters.rounding"),
        *("train.adapters.usage", "train.adapters.mount"),
        "train.planning.budget",
        "train.validation.validate",
        "data_tools.caption.captioners.*",
    ],
    5: [
        "train.loop",
        "train.assemble",
        "train.watch",
        "train.trainer",
        "train.encoding.prepare",
        "train.resumption",
        "train.planning.footprint",
        "data_tools.caption.job",
        "data_tools.caption.arguments",
    ],
    6: [
        "train.run",
        *("train.adapters.export_run", "train.adapters.examine"),
        *("train.adapters.convert", "train.adapters.merge", "train.adapters.resize"),
        *("train.compare", "train.generate.drawing"),
        *("train.planning.metered", "train.planning.phases"),
        *("train.planning.forecast", "train.planning.automatic"),
    ],
    7: [
        *("data_tools.inspect.report", "data_tools.inspect.page", "data_tools.inspect.tokens"),
        "data_tools.inspect.looks",
        *("data_tools.exchange.import_data", "data_tools.exchange.pack", "data_tools.*.command"),
        *("train.publishing.*", "train.commands.*"),
        *("train.planning.plan", "train.doctor", "train.py", "scripts", "scripts.*"),
    ],
}
"""Layer -> modules (fnmatch patterns). A module may import from the layers below its own."""

HIGHEST = {
    "train.loading.base": 2,
    "train.loading.frozen": 1,
    "train.lora": 1,
    **dict.fromkeys(("train.lora.adapter", "train.lora.targets", "train.lora.layers"), 1),
    **dict.fromkeys(("train.lora.dora", "train.lora.lokr", "train.lora.pissa"), 1),
    **dict.fromkeys(("train.lora.branch", "train.lora.eva"), 1),
    "train.lora.base": 2,
    "train.optim": 1,
    "train.average": 1,
    "train.speed": 1,
    "train.checkpoint": 2,
    "train.track": 2,
    "train.trackers": 1,
    "train.validation.split": 2,
    "train.watch": 4,
    "train.adapters.export": 1,
    "train.objective": 2,
    "train.loop": 0,
    "data_tools.inspect.command": 2,
    "data_tools.caption.job": 2,
    "data_tools.inspect.report": 2,
    "data_tools.inspect.page": 2,
    "data_tools.inspect.tokens": 3,
    "data_tools.exchange.import_data": 2,
    "data_tools.exchange.pack": 2,
    "data_tools.curate.command": 2,
}
"""Modules that may import from fewer layers than those below their own: the highest allowed."""

SIDEWAYS = {
    "train.config": {f"train.config.{name}" for name in ("schema", "adapter", "machine", "watch")},
    "train.config.adapter": {"train.config.schema"},
    "train.config.machine": {"train.config.schema"},
    "train.config.watch": {"train.config.schema"},
    "train.config.wording": {"train.config.schema"},
    "train.config.yaml_text": {"train.config.wording"},
    "train.config.reading": {"train.config", "train.config.*"},
    "data_tools.pictures": {"data_tools.formats", "data_tools.buckets"},
    "data_tools.folder": {"data_tools.formats"},
    "data_tools.drafts": {"data_tools.captions", "data_tools.folder", "data_tools.formats"},
    "data_tools.tables": {"data_tools.captions", "data_tools.drafts", "data_tools.folder"},
    "data_tools.masks": {"data_tools.*"},
    "data_tools.sidecars": {"data_tools.*"},
    "data_tools.sources": {"data_tools.*"},
    "data_tools.records": {"data_tools.*"},
    "data_tools.caption.answers": {"data_tools.captions", "data_tools.folder"},
    "data_tools.caption.files": {"data_tools.folder", "data_tools.sources"},
    "data_tools.caption.captioners.models": {"data_tools.caption.captioners.*"},
    "data_tools.caption.captioners.local": {"data_tools.caption.captioners.dialects"},
    "data_tools.curate.selection": {"data_tools.*"},
    "data_tools.curate.crops": {"data_tools.curate.*", "data_tools.pictures"},
    "data_tools.exchange.samples": {"data_tools.*"},
    "data_tools.exchange.containers": {"data_tools.*"},
    "data_tools.exchange.tars": {"data_tools.*"},
    "data_tools.inspect.*": {"data_tools.inspect.*"},
    "data_tools.holdout": {"data_tools.*"},
    "train.order": {"train.randomness"},
    "train.encoding.cache": {"train.files"},
    "train.track": {"train.trackers"},
    "train.validation.validate": {"train.objective"},
    "train.trainer": {"train.watch"},
    "train.generate.gallery": {"train.board", "train.files"},
    "train.generate.wishes": {"data_tools.*"},
    "train.adapters.mount": {"train.adapters.loaders", "train.adapters.skeleton"},
    "train.encoding.texts": {"train.encoding.cache"},
    "train.loading.transformer": {
        "train.loading.frozen",
        "train.loading.kept",
        "train.lora",
        "train.loading.weights",
    },
    "train.loading.base": {
        *("train.loading.packed", "train.loading.transformer", "train.loading.weights"),
    },
    "train.encoding.encode": {"train.loading.base"},
    "train.encoding.encode_text": {"train.loading.base", "train.encoding.encode"},
    "train.lora": {"train.lora.*"},
    "train.lora.*": {"train.lora.*", "train.lora", "train.adapters.updates"},
    "train.checkpoint": {"train.lora.*"},
    "train.adapters.comfyui": {"train.adapters.updates"},
    "train.adapters.source": {"train.adapters.*"},
    "train.adapters.opening": {"train.adapters.*"},
    "train.adapters.write": {"train.adapters.*"},
    "train.adapters.export": {"train.adapters.*", "train.lora", "train.lora.*"},
    "train.adapters.certify": {"train.adapters.bounds"},
    "train.adapters.rounding": {"train.adapters.skeleton"},
    "train.adapters.resize": {"train.adapters.convert"},
    "train.adapters.merge": {"train.adapters.convert", "train.adapters.resize"},
    "train.run": {"train.adapters.export_run", "train.planning.automatic"},
    "train.compare": {"train.adapters.export_run"},
    "train.planning.phases": {"train.planning.metered"},
    "train.planning.forecast": {"train.planning.phases", "train.planning.metered"},
    "train.planning.automatic": {"train.planning.metered"},
    "train.planning.plan": {"train.doctor"},
    "train.publishing.*": {"train.publishing.*"},
    "train.commands.publish": {"train.publishing.*"},
    "train.py": {"scripts.kindling"},
    "scripts.*": {"scripts.*", "data_tools.inspect.command"},
}
"""Allowed imports inside a layer (fnmatch patterns)."""


def source_files() -> dict[str, Path]:
    """Our modules, by name; the launcher `train.py` keeps its suffix, the package has the name."""
    files = {}
    for package in ("train", "data_tools", "scripts"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    if (ROOT / "train.py").exists():
        files["train.py"] = ROOT / "train.py"
    return files


def layer_of(module: str) -> int | None:
    """The layer of a module; None if it isn't in the table."""
    for layer, patterns in LAYERS.items():
        if any(fnmatchcase(module, pattern) for pattern in patterns):
            return layer
    return None


def imports(tree: ast.AST, *, package: str, modules: set[str]) -> Iterator[str]:
    """Which of `modules` a source file of `package` imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            origin = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
            found = next((prefix for prefix in prefixes if prefix in modules), None)
            if found:
                yield found


def fault(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`, both in the table; None if it may."""
    layer, below = layer_of(module), layer_of(imported)
    if layer is None or below is None or module == imported:
        return None  # a module without a layer has a test of its own
    for importer, allowed in SIDEWAYS.items():
        if fnmatchcase(module, importer) and any(fnmatchcase(imported, a) for a in allowed):
            return None if below == layer else f"{module}: SIDEWAYS is for one layer only"
    highest = HIGHEST.get(module, layer - 1)
    if below <= highest:
        return None
    return f"{module} (layer {layer}) imports {imported} (layer {below}); it may up to {highest}"


def test_every_module_has_a_layer() -> None:
    homeless = [name for name in source_files() if layer_of(name) is None]
    assert not homeless, f"no layer for {homeless}: put each into LAYERS in {Path(__file__).name}"


@pytest.mark.parametrize("module", sorted(source_files()))
def test_imports_go_downward(module: str) -> None:
    files = source_files()
    path = files[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    found = set(imports(tree, package=package, modules=set(files)))
    faults = [reason for imported in sorted(found) if (reason := fault(module, imported))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("train.errors", "train.config"),
        ("train.config", "train.config.reading"),
        ("train.config.schema", "train.config"),
        ("train.flow", "train.lora"),
        ("train.lora", "train.flow"),
        ("train.optim", "train.lora"),
        ("train.loop", "train.config"),
        ("train.objective", "train.lora"),
        ("data_tools.buckets", "data_tools.pictures"),
        ("data_tools.inspect.command", "train.loading.base"),
        ("train.run", "scripts.kindling"),
        ("scripts.demo", "train.py"),
    ],
)
def test_a_wrong_import_is_seen(module: str, imported: str) -> None:
    assert fault(module, imported)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import train.flow as f", {"train.flow"}),
        ("from train import flow, lora", {"train.flow", "train.lora"}),
        ("from train.flow import shift", {"train.flow"}),
        ("from . import flow", {"train.flow"}),
        ("from .flow import shift", {"train.flow"}),
        ("def f():\n    from train import lora", {"train.lora"}),
        ("if TYPE_CHECKING:\n    import train.lora", {"train.lora"}),
        ("import torch, trainer", set()),
    ],
)
def test_every_kind_of_import_is_seen(source: str, found: set[str]) -> None:
    modules = {"train", "train.flow", "train.lora"}
    assert set(imports(ast.parse(source), package="train", modules=modules)) == found
