"""What is in an adapter file, anyone's, and what each loader does with every key of it."""

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Certify from the command line; 0 if both loaders use every key at strength 1, else 1."""
    parser = argparse.ArgumentParser(prog="kindling certify", description=__doc__)
    parser.add_argument("file", type=Path, help="an adapter of any program, as safetensors")
    parser.add_argument(
        "--base", help="dev, klein-4b, klein-9b or a diffusers folder; default: by the shapes"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the whole report here")
    parser.add_argument("--html", type=Path, metavar="PATH", help="write it as a page")
    arguments = parser.parse_args(argv)
    from train.adapters import examine, files, page

    report = examine.examine(arguments.file, base=arguments.base)
    outputs = ((arguments.json, page.as_json), (arguments.html, page.as_html))
    for path, render in outputs:
        if path is not None:
            with files.replacing(path) as partial:
                partial.write_text(render(report), encoding="utf-8")
    print(page.as_text(report))
    return 0 if report["passed"] else 1
