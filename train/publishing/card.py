"""The model card: README.md as the Hugging Face Hub reads it.

Owns its front matter and its words. Facts are `facts`', the licence's are `licences`'.
"""

from typing import Any

from train.adapters.certify import TITLES
from train.adapters.usage import Usage, diffusers_snippet
from train.loading.base import DISTILLED
from train.publishing import licences, pictures
from train.publishing.facts import Exported, Publication

TAGS = ["text-to-image", "lora", "diffusers", "template:sd-lora", "flux2", "comfyui", "kindling"]
"""template:sd-lora makes the hub show the samples as a gallery."""

NOWHERE = "YOUR-NAME/YOUR-REPOSITORY"
"""Stands in the card for the repository until one is known."""


def as_markdown(publication: Publication, *, repository: str | None, samples: list[str]) -> str:
    """The whole card. samples: paths in the folder, of `publication.shown.samples` in order."""
    parts = [
        f"---\n{_front_matter(publication, samples)}\n---\n",
        f"# {publication.title}\n",
        *([f"{publication.description}\n"] if publication.description else []),
        _summary(publication),
        "<Gallery />\n" if samples else "",
        _board(publication),
        _use(publication, repository or NOWHERE),
        _training(publication),
        _licence(publication),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(publication: Publication, samples: list[str]) -> str:
    from huggingface_hub import ModelCardData

    licence = publication.licence
    fields: dict[str, Any] = {
        "license": licence.hub if licence else "unknown",
        "license_name": licence.hub_name if licence else None,
        "license_link": "LICENSE.md" if licence and licence.hub_name else None,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": publication.repository,
        "base_model_relation": "adapter" if publication.repository else None,
        "tags": list(dict.fromkeys([*TAGS, *publication.wishes.tags])),
        "instance_prompt": ", ".join(publication.triggers) or None,
        "widget": [
            {"text": sample.prompt, "output": {"url": path}}
            for sample, path in zip(publication.shown.samples, samples, strict=True)
        ]
        or None,
    }
    return ModelCardData(**fields).to_yaml().rstrip()


def _summary(publication: Publication) -> str:
    words = f"A LoRA adapter for {_base(publication)}"
    words += f", by {publication.author}" if publication.author else ""
    triggers = " and ".join(f"`{trigger}`" for trigger in publication.triggers)
    called = f" Its trigger is {triggers}: put it into the prompt." if triggers else ""
    return f"{words}. Strength 1.{called}\n"


def _base(publication: Publication) -> str:
    repository = publication.repository
    if repository is None:
        return f"`{publication.base}`, a base of FLUX.2's classes that isn't on the hub"
    link = f"[{repository}](https://huggingface.co/{repository})"
    if publication.revision:
        return link
    return f"{link} (trained on `{publication.base}`, a local base of its shape)"


def _board(publication: Publication) -> str:
    shown = publication.shown
    lines = []
    if shown.board:
        lines.append("![The same prompts and noise, without and with the adapter](board.png)\n")
    if shown.samples:
        lines.append(f"Pictures: {shown.origin}. Nobody picked among seeds.\n")
    return "\n".join(lines)


def _use(publication: Publication, place: str) -> str:
    best = pictures.best(publication.shown.samples, next(iter(publication.triggers), None))
    prompt = best.prompt if best else ", ".join(publication.triggers) or "a lighthouse at dusk"
    side = max(publication.config.data.resolutions)
    usage = Usage(
        file=publication.exported[0].path.name,
        pipeline=publication.certificate["diffusers"]["pipeline"],
        base=publication.repository or publication.base,
        released=publication.released,
        distilled=publication.repository in DISTILLED.values(),
        prompt=prompt,
        side=side,
        revision=publication.revision,
    )
    code = diffusers_snippet(usage, repository=place)
    rows = [f"- `{one.path.name}`: {_purpose(one)}" for one in publication.exported]
    main = publication.exported[0].path
    fit = next((one for one in publication.exported if "comfyui" in one.loaders), None)
    comfyui = f"In ComfyUI, put `{(fit or publication.exported[0]).path.name}` into `models/loras`"
    if publication.workflows:
        names = " or ".join(f"`{path.name}`" for path in publication.workflows)
        comfyui += f" and open {names}"
    return (
        f"## Use\n\n```python\n{code}```\n\n{comfyui}.\n\n"
        + "\n".join(rows)
        + f"\n\n`{main.stem}.certificate.json` is the proof: diffusers' own loader uses every key "
        "at strength 1 and the output is the trained adapter's; ComfyUI's loading rules too, for "
        "each file that is for it.\n"
    )


def _purpose(exported: Exported) -> str:
    """Who loads a file, and whose names it has."""
    loaders = " and ".join(TITLES[name] for name in exported.loaders)
    return f"for {loaders}" + _NAMES[exported.layout]


_NAMES = {"diffusers": "", "comfyui": ", in BFL's names", "kohya": ", in kohya's names"}


def training_rows(publication: Publication) -> list[tuple[str, str]]:
    """How it was trained, name and value."""
    config, metadata = publication.config, publication.metadata
    optim, lora = config.optim, publication.certificate["adapter"]
    counts = publication.pictures
    rate = f"{optim.name}, lr {optim.lr:g}, {optim.schedule}"
    weights = "" if config.base.quantize == "none" else f", {config.base.quantize} in training"
    rows = [
        ("base", f"{publication.base}{weights}"),
        ("base revision", publication.revision),
        ("pictures", " + ".join(map(str, counts)) if counts else None),
        ("resolution", ", ".join(map(str, config.data.resolutions)) + " px"),
        ("steps", f"{publication.step} of {config.train.steps}"),
        ("batch", f"{config.train.batch_size} a device x {config.train.accumulate} accumulated"),
        ("rank, alpha", f"{lora['rank']}, {lora['alpha']:g}, folded in: strength 1"),
        ("Linears", str(lora["modules"])),
        ("optimizer", rate),
        ("noise levels", metadata.get("kindling.sigma_sampling")),
        ("shift in training", metadata.get("kindling.training_shift")),
        ("guidance in training", metadata.get("kindling.guidance")),
        ("weights", metadata.get("kindling.weights")),
        ("checkpoint", publication.certificate["checkpoint"]["rule"]),
        ("seed", str(config.seed)),
        ("config digest", metadata.get("kindling.config_hash")),
        ("data digest", metadata.get("kindling.data_hash")),
        ("made with", f"Kindling {metadata.get('kindling.version', '')}".strip()),
    ]
    return [(name, value.replace("|", "\\|")) for name, value in rows if value]


def measured(publication: Publication) -> list[str]:
    """Sentences about the loss on fixed pictures and the drift."""
    check = publication.check
    if check is None:
        return []
    of = "held-out pictures" if check["held_out"] else "trained pictures at fixed noise"
    text = f"Loss on {of}: {check['loss']:.4f} ± {check['error']:.4f}"
    if check["to_base"] is not None:
        text += f", {check['to_base']:+.4f} ± {check['to_base_error']:.4f} to the base"
    sentences = [f"{text}."]
    if check["drift"] is not None:
        sentences.append(
            f"Drift, how far the model's velocity moves at prompts without the subject: "
            f"{check['drift']:.1%}."
        )
    return sentences


def _training(publication: Publication) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in training_rows(publication))
    words = "\n".join(f"- {sentence}" for sentence in measured(publication))
    missing = "; ".join(en for en, _ in publication.unmeasured)
    return (
        f"## Training\n\n| | |\n|---|---|\n{rows}\n\n"
        + (f"{words}\n" if words else "")
        + f"- Not measured: {missing}.\n"
    )


def _licence(publication: Publication) -> str:
    licence = publication.licence
    if licence is None:
        return (
            "## Licence\n\nBound by the licence of its base, which isn't known here: say which, "
            "here and in `license` above.\n"
        )
    name = licences.title(licence, publication.terms)
    duties = "\n".join(f"- {duty.en} ({duty.section})" for duty in licence.duties)
    statement = licences.statement(
        licence, title=publication.title, base=_bound_to(publication), text=publication.terms
    )
    quoted = "\n".join(f"> {line}".rstrip() for line in statement.strip().splitlines())
    return (
        f"## Licence\n\n{name}, that of the base: see [LICENSE.md](LICENSE.md).\n\n"
        f"{quoted}\n\nIts main points, in our words; the text itself binds:\n\n{duties}\n"
    )


def _bound_to(publication: Publication) -> str:
    return publication.repository or f"the base {publication.base}"
