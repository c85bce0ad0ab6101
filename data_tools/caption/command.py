"""`kindling caption`: write captions for a folder of pictures.

Owns the command and its words. The options are in `arguments`, the work in `job`, the files in
`files`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools import folder
from data_tools.caption import arguments, files, journal
from data_tools.caption.arguments import Options
from data_tools.caption.job import Job, Outcome, Todo, survey
from data_tools.caption.journal import Journal
from data_tools.sources import Draft
from train.errors import ConfigError, UserError, bullet_list

EXAMPLES = 3
"""New captions that are shown."""


def main(argv: Sequence[str] | None = None) -> int:
    """Caption a folder of pictures; exit status 0 if all have a caption, 2 if some could not."""
    options = arguments.parse(argv)
    todo = survey(
        options.images,
        replace=options.replace,
        add_unlisted=options.add_unlisted,
        needs_references=options.purpose == "edit",
    )
    _check_files(options)
    if options.write == "sidecars":
        clashes = files.shared_sidecars(todo.drafts)
        clashes = {
            draft.name: clashes[draft.name] for draft in todo.wanted if draft.name in clashes
        }
        todo.failed |= clashes
        todo.wanted = [draft for draft in todo.wanted if draft.name not in clashes]
    left = todo.wanted[options.limit :] if options.limit else []
    todo.wanted = todo.wanted[: options.limit]
    print(_head(options, todo, left=len(left)))
    outcome = _caption(options, todo) if todo.wanted else Outcome()
    outcome.failed = todo.failed | outcome.failed
    if outcome.captions and options.write == "metadata":
        text = files.metadata(options.images, todo.drafts, outcome.captions)
        kept = files.write(options.output, text)
        print(_written(options, todo, kept))
    if todo.wanted or outcome.failed:
        print(_summary(options, outcome))
    return 2 if outcome.failed else 0


def _caption(options: Options, todo: Todo) -> Outcome:
    """Run the job; what was finished before an error is in the journal, and that is said."""
    instruction = arguments.instruction(options) if options.kind != "filename" else None
    kept = Journal(options.output.parent / journal.NAME)

    def on_caption(draft: Draft, caption: str) -> None:
        if options.write == "sidecars":
            files.write_sidecar(options.images, draft, caption)

    outcome = Outcome()
    try:
        job = Job(
            root=options.images,
            captioner=arguments.open_captioner(options),
            journal=kept,
            instruction=instruction,
            longest_side=options.longest_side,
            language=options.language if instruction else "",
            trigger=options.trigger,
            on_caption=on_caption,
            outcome=outcome,
        )
        return job.run(todo.wanted)
    except (UserError, KeyboardInterrupt):
        if outcome.captions:
            done = f"{len(outcome.captions)} of {len(todo.wanted)} captions are finished and kept"
            print(f"{done}; the same command goes on from there", file=sys.stderr)
        raise
    finally:
        kept.close()


def _check_files(options: Options) -> None:
    """Stop before any work that couldn't be written. Raises ConfigError."""
    own = options.images / folder.METADATA
    if options.write == "sidecars" and own.exists():
        raise ConfigError(
            f"{own} has the captions of this folder, and with it .txt files are not read; "
            "leave out --write sidecars"
        )
    if options.output.absolute() == own.absolute() or options.write == "sidecars":
        return
    if options.output.exists() and not options.replace:
        raise ConfigError(
            f"{options.output} exists already; name another file, or --replace it (the old one is "
            f"kept as {options.output.name}.bak)"
        )
    if not options.output.parent.is_dir():
        raise ConfigError(f"--output: there is no folder {options.output.parent}; make it first")


def _head(options: Options, todo: Todo, *, left: int) -> str:
    total = len(todo.drafts)
    had = sum(bool(draft.caption) for draft in todo.drafts)
    line = f"{options.images}: {_count(total, 'picture')}, {had} with a caption"
    lines = [f"{line}; {len(todo.wanted)} to caption" + (f", {left} left out" if left else "")]
    if todo.unlisted:
        names = ", ".join(todo.unlisted[:5]) + (" ..." if len(todo.unlisted) > 5 else "")
        lines.append(
            f"not in metadata.jsonl and left alone (--add-unlisted takes them in): {names}"
        )
    if options.purpose not in ("edit", None) and any(draft.references for draft in todo.wanted):
        lines.append("some have references, which only --for edit looks at")
    if not todo.wanted and had == total:
        lines.append("nothing to do; --replace would caption them anew")
    return "\n".join(lines)


def _written(options: Options, todo: Todo, kept: Path | None) -> str:
    lines = [f"wrote {options.output}"]
    if kept:
        lines.append(f"what it held before is in {kept}")
    inside = options.output.absolute() == (options.images / folder.METADATA).absolute()
    if inside and todo.has_sidecars:
        lines.append("its captions count from now on; the .txt files stay and are no longer read")
    if not inside:
        lines.append(f"to train with it, put it into {options.images} as {folder.METADATA}")
    return "\n".join(lines)


def _summary(options: Options, outcome: Outcome) -> str:
    lines = []
    done = outcome.captions
    if done:
        kept = f", {outcome.kept} of them in an earlier run" if outcome.kept else ""
        lines.append(f"{_count(len(done), 'caption')}{kept}:")
        names = sorted(done, key=folder.natural)[:EXAMPLES]
        lines += [f"  {name}: {done[name]}" for name in names]
        lines += [f"  ... and {len(done) - EXAMPLES} more"] if len(done) > EXAMPLES else []
    if done and options.write == "sidecars":
        lines.insert(0, f"wrote {_count(len(done), '.txt file')} beside the pictures")
    if outcome.prefixed:
        lines.append(f"{outcome.prefixed} lacked {options.trigger!r} and got it put in front")
    if outcome.failed:
        names = sorted(outcome.failed, key=folder.natural)
        rows = [f"{name}: {outcome.failed[name]}" for name in names]
        title = f"Not captioned ({len(rows)}; the same command tries these again):"
        lines.append(bullet_list(title, rows, limit=len(rows)))
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
