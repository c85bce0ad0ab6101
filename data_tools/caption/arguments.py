"""The command line of `kindling caption`: options, their defaults, and which belong to whom.

An option that the chosen captioner or purpose would ignore is an error. Opens the captioner, too,
since each takes its own part of the options.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.caption import instructions
from data_tools.caption.captioners import Captioner
from data_tools.caption.instructions import Instruction
from train.errors import ConfigError, DataError

KINDS = ("base", "hf", "http", "filename")
DEFAULTS: dict[str, tuple[object, tuple[str, ...]]] = {
    "language": ("en", ("base", "hf", "http")),
    "traits": ("out", ("base", "hf", "http")),
    "constant": ("", ("base", "hf", "http")),
    "instruction": (None, ("base", "hf", "http")),
    "longest_side": (1024, ("base", "hf", "http")),
    "max_tokens": (512, ("base", "hf", "http")),
    "base": ("dev", ("base",)),
    "batch_size": (1, ("base", "hf")),
    "dtype": ("bf16", ("base", "hf")),
    "quantize": ("none", ("base", "hf")),
    "model": (None, ("http",)),
    "concurrency": (4, ("http",)),
    "timeout": (120.0, ("http",)),
    "retries": (5, ("http",)),
}
"""Option -> its default, and the captioners that heed it."""

EPILOG = """\
captioners:
  base           the text encoder of FLUX.2-dev itself: nothing more to download for who has dev
  hf:MODEL       a model of transformers, e.g. hf:Qwen/Qwen3-VL-8B-Instruct or a folder
  http:URL       a server with OpenAI's protocol (vLLM, Ollama, LM Studio), e.g.
                 http://127.0.0.1:8000/v1; its key, if any, in the variable KINDLING_CAPTION_KEY
  filename       the words of the file name

Captions that exist are kept unless --replace is given, and then the old ones stay in NAME.bak.
A run that was stopped goes on where it was when the same command is started again.
Exit status: 0 if every picture has its caption, 2 if some could not be captioned.
"""


@dataclass(frozen=True)
class Options:
    """What was asked for, complete."""

    images: Path
    kind: str
    source: str
    """What follows the captioner's kind: a repository, a folder, a URL."""
    purpose: str | None
    trigger: str
    write: str
    output: Path
    """The metadata.jsonl to write; with sidecars unused but for its folder."""
    replace: bool
    add_unlisted: bool
    limit: int | None
    language: str
    traits: str
    constant: str
    instruction: str | None
    longest_side: int
    max_tokens: int
    base: str
    batch_size: int
    dtype: str
    quantize: str
    model: str | None
    concurrency: int
    timeout: float
    retries: int


def parse(argv: Sequence[str] | None) -> Options:
    """The options. Raises ConfigError that lists everything wrong with them."""
    given = vars(_parser().parse_args(argv))
    kind, source = _captioner(given.pop("captioner"))
    problems = [
        f"--{name.replace('_', '-')} is for {' and '.join(heeded)}, not for {kind}"
        for name, (_, heeded) in DEFAULTS.items()
        if given[name] is not None and kind not in heeded
    ]
    if given["traits"] is not None and given["purpose"] not in instructions.NAMED:
        problems.append(f"--traits is for --for {' and --for '.join(instructions.NAMED)}")
    if given["purpose"] is None and kind != "filename":
        problems.append(f"say what the captions are for: --for {'|'.join(instructions.PURPOSES)}")
    if given["instruction"] and (given["constant"] or given["traits"]):
        problems.append(
            "--instruction is the whole task: it leaves no room for --traits, --constant"
        )
    if given["write"] == "sidecars" and given["output"]:
        problems.append("--output is for --write metadata; sidecars go beside their pictures")
    if given["output"] and given["output"].suffix != ".jsonl":
        problems.append(f"--output must be a .jsonl file; got {given['output']}")
    if problems:
        raise ConfigError("\n".join(problems))
    for name, (default, _) in DEFAULTS.items():
        given[name] = default if given[name] is None else given[name]
    images = given.pop("images").expanduser()
    output = given.pop("output") or images / "metadata.jsonl"
    trigger = given.pop("trigger").strip()
    return Options(images=images, kind=kind, source=source, output=output, trigger=trigger, **given)


def instruction(options: Options) -> Instruction:
    """What the captioner is told. Raises ConfigError, and DataError for the user's own text."""
    assert options.purpose is not None
    own = ""
    if options.instruction:
        path = Path(options.instruction)
        try:
            own = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"--instruction {path}: can't be read as UTF-8 text ({error})"
            ) from None
        if not own:
            raise DataError(f"--instruction {path}: empty")
    return instructions.build(
        options.purpose,
        language=options.language,
        trigger=options.trigger,
        traits=options.traits,
        constant=options.constant,
        own=own,
    )


def open_captioner(options: Options) -> Captioner:
    """The captioner, loaded or connected. Raises UserError."""
    if options.kind == "filename":
        from data_tools.caption.captioners.filename import FileName

        return FileName()
    if options.kind == "http":
        from data_tools.caption.captioners import server

        settings = server.Settings(
            concurrency=options.concurrency,
            timeout=options.timeout,
            retries=options.retries,
            max_tokens=options.max_tokens,
        )
        return server.Server(options.source, model=options.model, settings=settings)
    from data_tools.caption.captioners import local, models

    settings = local.Settings(
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
        dtype=options.dtype,
        quantize=options.quantize,
    )
    if options.kind == "base":
        return models.of_base(options.base, settings=settings)
    assert options.purpose is not None
    return models.of_hub(
        options.source, settings=settings, purpose=options.purpose, language=options.language
    )


def _captioner(spec: str) -> tuple[str, str]:
    """Kind and source; a plain URL is one, too."""
    kind, _, source = spec.partition(":")
    if kind in ("http", "https"):
        nested = kind == "http" and not source.startswith("//")
        return "http", source if nested else spec
    if (kind in ("hf",) and source) or (kind in ("base", "filename") and not source):
        return kind, source
    raise ConfigError(
        f"--captioner: there is no captioner {spec!r}; there are base, hf:MODEL, http:URL, filename"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kindling caption",
        description="Write captions for a folder of pictures. The pictures are only read.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("images", type=Path, help="folder of pictures")
    add("--captioner", required=True, metavar="base|hf:MODEL|http:URL|filename", help="see below")
    add("--for", dest="purpose", choices=instructions.PURPOSES, help="what the captions teach")
    add("--trigger", default="", help="the word that calls the subject; every caption gets it")
    words = parser.add_argument_group("words")
    add = words.add_argument
    add("--language", choices=instructions.LANGUAGES, help="of the captions (en)")
    add("--traits", choices=("out", "in"), help="constant traits of a character or product (out)")
    add("--constant", metavar="TEXT", help='what they are, e.g. "red scarf, one eye"')
    add("--instruction", metavar="FILE", help="your own task, in a text file, instead of ours")
    files = parser.add_argument_group("files")
    add = files.add_argument
    add(
        "--write",
        choices=("metadata", "sidecars"),
        default="metadata",
        help="one metadata.jsonl (the default), or a .txt beside each picture",
    )
    add("--output", type=Path, metavar="FILE", help="a .jsonl file (IMAGES/metadata.jsonl)")
    add("--replace", action="store_true", help="caption anew what has a caption; keeps NAME.bak")
    add("--add-unlisted", action="store_true", help="take in pictures that metadata.jsonl lacks")
    add("--limit", type=_positive, metavar="N", help="only the first N, to see how they turn out")
    _captioner_options(parser)
    return parser


def _captioner_options(parser: argparse.ArgumentParser) -> None:
    seen = parser.add_argument_group("all but filename")
    add = seen.add_argument
    add("--longest-side", type=_positive, metavar="PIXELS", help="what they see at most (1024)")
    add("--max-tokens", type=_positive, metavar="N", help="longest answer (512)")
    add = parser.add_argument_group("base and hf").add_argument
    add("--base", metavar="MODEL", help="which base (dev)")
    add("--batch-size", type=_positive, metavar="N", help="pictures at once (1)")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="of the weights (bf16)")
    add("--quantize", choices=("none", "8bit", "4bit"), help="weights in less memory; NVIDIA only")
    add = parser.add_argument_group("http").add_argument
    add("--model", metavar="NAME", help="which model, where the server has several")
    add("--concurrency", type=_positive, metavar="N", help="requests at once (4)")
    add("--timeout", type=_positive, metavar="SECONDS", help="for a request (120)")
    add("--retries", type=_positive, metavar="N", help="after a failed request (5)")
