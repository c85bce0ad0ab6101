"""The report on an adapter file, as lines for the console, as JSON and as a page.

Owns words and looks; every figure is `examine`'s.
"""

import json
from html import escape
from typing import Any

LOADERS = {"diffusers": "diffusers", "comfyui": "ComfyUI"}

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "color:#1d2129;background:#fff}h1{font-size:1.3rem}table{border-collapse:collapse;width:100%}"
    "td,th{text-align:left;padding:.2rem .6rem .2rem 0;border-bottom:1px solid #e4e6ea;"
    "vertical-align:top}code{font:13px ui-monospace,monospace;word-break:break-all}"
    ".yes{color:#0a7d33}.no{color:#b42318}summary{cursor:pointer;margin-top:1rem}"
    "@media(prefers-color-scheme:dark){body{color:#e6e6e6;background:#16181d}"
    "td,th{border-color:#333}.yes{color:#4ecb71}.no{color:#ff7b6b}}"
)


def as_json(report: dict[str, Any]) -> str:
    """The whole report."""
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_text(report: dict[str, Any]) -> str:
    """A dozen lines or so."""
    lines = [f"{name + ':':<12}{value}" for name, value in _facts(report)]
    for key, loader in LOADERS.items():
        verdict = report[key]
        lines.append(f"{loader + ':':<12}{sentence(verdict)}")
        lines += [f"{'':<12}{reason}" for reason in verdict["reasons"]]
        if verdict["advice"]:
            lines.append(f"{'':<12}{verdict['advice']}")
    lines += [f"{'fault:':<12}{fault}" for fault in _faults(report)]
    if report["remedy"]:
        lines.append(f"{'remedy:':<12}{report['remedy']}")
    return "\n".join(lines)


def as_html(report: dict[str, Any]) -> str:
    """One page without scripts or anything from elsewhere."""
    name = escape(report["file"]["name"])
    rows = "".join(_row(title, escape(str(value))) for title, value in _facts(report))
    for key, loader in LOADERS.items():
        verdict = report[key]
        kind = "yes" if verdict["exact"] else "no"
        text = f"<b class={kind}>{escape(sentence(verdict))}</b>"
        extra = [*verdict["reasons"], *([verdict["advice"]] if verdict["advice"] else [])]
        rows += _row(loader, "<br>".join([text, *map(escape, extra)]))
    rows += "".join(_row("fault", escape(fault)) for fault in _faults(report))
    if report["remedy"]:
        rows += _row("remedy", escape(report["remedy"]))
    keys = "".join(
        f"<tr><td><code>{escape(key)}</code><td>{escape(status)}"
        f"<td>{escape(report['comfyui']['keys'][key])}"
        for key, status in report["diffusers"]["keys"].items()
    )
    norms = "".join(
        f"<tr><td><code>{escape(unit)}</code><td>{norm:.4g}"
        for unit, norm in report["numbers"]["norms"].items()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>"
        f"<style>{STYLE}</style><h1>{name}</h1><table>{rows}</table>"
        f"<details><summary>Every key</summary><table><tr><th>key<th>diffusers<th>ComfyUI{keys}"
        f"</table></details><details><summary>Norm of every update</summary><table>{norms}</table>"
        "</details></html>\n"
    )


def sentence(verdict: dict[str, Any]) -> str:
    """Whether a loader loads the file, and at which strength."""
    if not verdict["loads"]:
        return "no, it loads nothing"
    if verdict["exact"]:
        measured = verdict["strength"] is not None
        return "yes, every key" + (", at strength 1" if measured else "; strength not measured")
    if verdict["strength"] in (None, 1.0):
        return "only partly"
    return f"yes, but at strength {verdict['strength']:g} of what was trained"


def _facts(report: dict[str, Any]) -> list[tuple[str, Any]]:
    file, adapter, base = report["file"], report["adapter"], report["base"]
    where = "given" if base["given"] else "by the shapes"
    shape = f"{base['width']} wide, {base['double']} double and {base['single']} single blocks"
    dtypes, size = ", ".join(file["dtypes"]), f"{file['bytes'] / 1e6:.1f} MB"
    norm = report["numbers"]["norm"]
    facts = [
        ("file", f"{file['name']}, {size}, {file['tensors']} tensors, {dtypes}"),
        ("layout", report["format"]),
        ("base", f"{base['name'] or 'none that was released'} ({where}): {shape}"),
        (
            "adapter",
            f"{adapter['kind']}, {adapter['linears']} Linears, rank {_counts(adapter['ranks'])}, "
            f"scale {_counts(adapter['scales'])} (from {adapter['scale_from']})",
        ),
        ("targets", _targets(adapter["targets"])),
    ]
    if norm:
        text = f"{norm['least']:.3g} to {norm['greatest']:.3g}, median {norm['median']:.3g}"
        facts.append(("norms", f"{text}; greatest at {norm['greatest_at']}"))
    if report["rounding"]:
        losses = ", ".join(f"{kind} {loss:.2%}" for kind, loss in report["rounding"].items())
        facts.append(("merging", f"loses by rounding: {losses} of the adapter (rows sampled)"))
    return facts


def _faults(report: dict[str, Any]) -> list[str]:
    faults = [f"{name}: {why}" for name, why in report["misfits"].items()]
    faults += [f"{name} {why}" for name, why in report["unusable"].items()]
    faults += report["numbers"]["faults"]
    zero = report["numbers"]["zero"]
    if zero:
        faults.append(f"{len(zero)} updates are zero, such as {zero[0]}")
    shown = faults[:10]
    return shown + ([f"… and {len(faults) - 10} more"] if len(faults) > 10 else [])


def _targets(counts: dict[str, int]) -> str:
    """`double: img_attn.qkv 24, img_mlp.0 8; single: linear1 48`."""
    groups: dict[str, list[str]] = {}
    for part, count in counts.items():
        blocks, _, rest = part.partition("_blocks.*.")
        groups.setdefault(blocks if rest else "outside", []).append(f"{rest or part} {count}")
    return "; ".join(f"{blocks}: {', '.join(parts)}" for blocks, parts in groups.items())


def _counts(counts: dict[str, int]) -> str:
    """`16`, or `16 (180), 8 (12)`."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({n})" for value, n in counts.items())


def _row(title: str, value: str) -> str:
    return f"<tr><th>{escape(title)}<td>{value}"
