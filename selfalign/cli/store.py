"""`selfalign-store`: list the artifacts of the store, explain why two runs do not share one, remove unused ones."""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from selfalign.cli.commands import command_parser
from selfalign.cli.environment import set_streams
from selfalign.cli.errors import report_errors
from selfalign.core.errors import SelfalignError
from selfalign.core.formatting import age, amount, duration, plural, printable, table
from selfalign.store.inventory import Inventory, StoredArtifact, remove, remove_locks, scan_store, total_size
from selfalign.store.key_diff import KeyDiff, read_stages

EXAMPLES = {
    "selfalign-store list": "every artifact: size, time, age, and the runs that use it",
    "selfalign-store why demo-1a2b3c4d demo-5e6f7a8b": "the first stage that two runs do not share, and why",
    "selfalign-store clean": "remove artifacts that no run uses, after asking",
}

NAMED = 2
"""Number of runs or labels that a line of the list names before it counts the others."""


def main() -> None:
    """Run the command line.

    Exit codes: 0; 1 for an error that the user can correct, a bug, or the answer "no"; 2 for wrong usage; 130 for
    Ctrl-C.
    """
    set_streams()
    options = _parser().parse_args()
    with report_errors("interrupted; artifacts removed so far are gone, all others are complete"):
        with suppress(BrokenPipeError):
            code = options.command(options)
            sys.stdout.flush()
            sys.exit(code)
        os._exit(141)  # Like any program before `| head`.


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--output", type=Path, default=Path("outputs"), help="the folder of the runs and their store")
    parser = command_parser("selfalign-store", "", EXAMPLES)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser)

    def add(name: str, command: Callable[[argparse.Namespace], int], meaning: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[shared], help=meaning, description=meaning)
        added.set_defaults(command=command)
        return added

    add("list", list_kept, "list every artifact with its size and the runs that use it, the largest first")
    why = add("why", explain_keys, "show the first stage that two runs do not share, and the inputs that differ")
    why.add_argument("runs", nargs=2, metavar="RUN", help="a run's folder, or its name below the output folder")
    why.add_argument("label", nargs="?", metavar="LABEL", help="a stage such as M2: show only what its key depends on")
    clean = add("clean", clean_up, "remove artifacts that no run below the output folder uses, after asking")
    clean.add_argument("--yes", action="store_true", help="do not ask")
    return parser


# --- list --------------------------------------------------------------------------------------------------------


def list_kept(options: argparse.Namespace) -> int:
    """Print the artifacts of the store."""
    inventory = scan_store(options.output)
    kept = sorted(inventory.kept.values(), key=lambda one: (-total_size([one]), one.name))
    unused = inventory.unused(inventory.in_progress)
    print("\n".join([*listing(inventory, kept), "", *_by_stage(kept), "", *_remarks(inventory, unused)]))
    return 0


def listing(inventory: Inventory, kept: Iterable[StoredArtifact]) -> list[str]:
    """Return a table of artifacts."""
    users, now = inventory.users(), time.time()

    def row(one: StoredArtifact) -> list[str]:
        uses = inventory.uses.get(one.name, [])
        runs = _few(use.run for use in uses) or _few(f"linked from {name}" for name in users.get(one.name, []))
        took = one.state.value if one.seconds is None else duration(one.seconds)
        since, size = age(now - one.changed), amount(total_size([one]))
        return [one.stage, one.key, f"{size:>7}", took, since, _few(use.label for use in uses), runs or "–"]

    return table(["stage", "key", "   size", "took", "age", "as", "used by"], [row(one) for one in kept])


def _few(names: Iterable[str]) -> str:
    """Return the first names, and the number of the others."""
    different = sorted({printable(name) for name in names if name})
    others = len(different) - NAMED
    return ", ".join(different[:NAMED]) + (f" and {others} more" if others > 0 else "")


def _by_stage(kept: Sequence[StoredArtifact]) -> list[str]:
    """Return the totals of each stage and of all, the largest first."""
    stages = {stage: [one for one in kept if one.stage == stage] for stage in dict.fromkeys(k.stage for k in kept)}
    groups = sorted(stages.items(), key=lambda item: -total_size(item[1]))
    rows = [
        [name, str(len(group)), f"{amount(total_size(group)):>7}", duration(math.fsum(k.seconds or 0 for k in group))]
        for name, group in [*groups, ("all", kept)]
    ]
    return table(["stage", "artifacts", "   size", "took"], rows)


def _remarks(inventory: Inventory, unused: Sequence[StoredArtifact]) -> Iterator[str]:
    if unused:
        size = amount(_freed(inventory, unused))
        yield f"used by no run: {plural(len(unused), 'artifact')}, {size}; selfalign-store clean removes them"
    else:
        yield "all artifacts are used"
    for link in inventory.broken:
        yield f"broken link, its artifact is gone: {printable(link)}"
    for name in inventory.foreign:
        yield f"not an artifact, left unchanged: {printable(name)}"


def _freed(inventory: Inventory, gone: Iterable[StoredArtifact]) -> int:
    """Return the bytes that removing these artifacts frees; a file that another artifact shares is not counted."""
    names = {one.name for one in gone}
    return total_size(inventory.kept.values()) - total_size(k for k in inventory.kept.values() if k.name not in names)


# --- why ---------------------------------------------------------------------------------------------------------


def explain_keys(options: argparse.Namespace) -> int:
    """Print why two runs do not share more artifacts."""
    folders = [_run_folder(name, options.output) for name in options.runs]
    comparison = KeyDiff(*map(read_stages, folders))
    both = {**comparison.first, **comparison.second}
    if options.label and options.label not in both:
        raise SelfalignError(f"neither run has a stage {options.label}; they have {', '.join(both)}")
    shown = comparison.behind(options.label) if options.label else set(both)
    print("\n".join(why(comparison, [folder.name for folder in folders], shown)))
    return 0


def why(comparison: KeyDiff, names: Sequence[str], shown: Collection[str]) -> Iterator[str]:
    """Yield the inputs that differ in themselves, in the order of the pipeline, and the stages that depend on them.

    Args:
        comparison: of the two runs.
        names: of the runs.
        shown: the labels that are reported.
    """
    one, other = comparison.first, comparison.second
    causes = comparison.causes(shown)
    roots = {label: news for label, news in causes.items() if news}
    for number, (label, news) in enumerate(roots.items()):
        keys = f"{one[label].stage}/{one[label].key} and {other[label].stage}/{other[label].key}"
        yield f"{label} {'also differs in itself' if number else 'is the first stage that differs'}: {keys}"
        for difference in news:
            derived = " (derived from the run's seed)" if difference.is_seed else ""
            yield f"  {difference.path}{derived}: {comparison.value(difference)}"
    yield from _line("differ as a result", [label for label in causes if label not in roots])
    yield from _line("two keys, but not finished in both runs", [n for n in comparison.unknown if n in shown])
    for own, others, name in ((one, other, names[0]), (other, one, names[1])):
        yield from _line(f"only in {printable(name)}", [n for n in own if n not in others and n in shown])
    same = [label for label in comparison.same if label in shown]
    yield from _line("all the same" if len(same) == len(shown) else "the same", same)


def _line(heading: str, labels: Sequence[str]) -> Iterator[str]:
    if labels:
        yield f"{heading}: {', '.join(map(printable, labels))}"


def _run_folder(name: str, output: Path) -> Path:
    found = [folder for folder in (Path(name), output / name) if (folder / "artifacts").is_dir()]
    if not found:
        raise SelfalignError(f"{name!r} is neither a run folder nor the name of a run in {output}")
    return found[0]


# --- clean -------------------------------------------------------------------------------------------------------


def clean_up(options: argparse.Namespace) -> int:
    """Remove artifacts that no run uses, after listing them and asking."""
    inventory = scan_store(options.output)
    unused = inventory.unused(inventory.in_progress)
    if not (unused or inventory.locks):
        print("all artifacts are used; there is nothing to remove")
        return 0
    what = f"{plural(len(unused), 'artifact')}, {amount(_freed(inventory, unused))}"
    print("\n".join([*listing(inventory, unused), ""] if unused else []))
    print(f"used by no run: {what}; {plural(len(inventory.locks), 'lock')} without an artifact")
    if not options.yes and not _agreed():
        print("nothing was removed")
        return 1
    gone = remove(options.output, unused)
    locks = remove_locks(inventory.locks)
    print(f"removed: {plural(len(gone), 'artifact')}, {plural(locks, 'lock')}")
    if len(gone) < len(unused):
        print(f"kept, because a process now uses them: {plural(len(unused) - len(gone), 'artifact')}")
    return 0


def _agreed() -> bool:
    """Ask for confirmation, which needs a terminal."""
    if not sys.stdin.isatty():
        raise SelfalignError(
            "nothing was removed, because there is no terminal to ask. Set --yes to remove without asking"
        )
    try:
        return input("Remove them? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
