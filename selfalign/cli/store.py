"""`selfalign-store`: what the store keeps, why two runs share no more of it, and removing what no run uses."""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from selfalign.cli.environment import set_streams
from selfalign.cli.errors import report_errors
from selfalign.core.errors import SelfalignError
from selfalign.core.formatting import age, amount, duration, plural, printable, table
from selfalign.store.inventory import Inventory, StoredArtifact, remove, remove_locks, scan_store, total_size
from selfalign.store.key_diff import KeyDiff, read_stages

NAMED = 2
"""Runs, and labels, that a line of the list names before it counts the others."""


def main() -> None:
    """Runs the command line; exit code 0, 1 for what the user can mend or a "no", 2 for bad usage, 130 for Ctrl-C."""
    set_streams()
    options = _parser().parse_args()
    with report_errors("interrupted; what was removed by then is gone, the rest is whole"):
        with suppress(BrokenPipeError):
            code = options.command(options)
            sys.stdout.flush()
            sys.exit(code)
        os._exit(141)  # as any program in front of `| head`


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--output", type=Path, default=Path("outputs"), help="the folder of the runs and their store")
    parser = argparse.ArgumentParser(prog="selfalign-store", description=(__doc__ or "").partition(": ")[2])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], meaning: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[shared], help=meaning, description=meaning)
        added.set_defaults(command=command)
        return added

    add("list", list_kept, "every artifact with its size and who uses it, the largest first")
    why = add("why", explain_keys, "the first stage of two runs that they don't share, and the inputs that differ")
    why.add_argument("runs", nargs=2, metavar="RUN", help="a run's folder, or its name below the output folder")
    why.add_argument("label", nargs="?", metavar="LABEL", help="a stage such as M2: only what its key depends on")
    clean = add("clean", clean_up, "remove what no run below the output folder uses; asks first")
    clean.add_argument("--yes", action="store_true", help="do not ask")
    return parser


# --- list --------------------------------------------------------------------------------------------------------


def list_kept(options: argparse.Namespace) -> int:
    """Prints what the store keeps."""
    inventory = scan_store(options.output)
    kept = sorted(inventory.kept.values(), key=lambda one: (-total_size([one]), one.name))
    unused = inventory.unused(inventory.in_progress)
    print("\n".join([*listing(inventory, kept), "", *_by_stage(kept), "", *_remarks(inventory, unused)]))
    return 0


def listing(inventory: Inventory, kept: Iterable[StoredArtifact]) -> list[str]:
    """A table of artifacts."""
    users, now = inventory.users(), time.time()

    def row(one: StoredArtifact) -> list[str]:
        uses = inventory.uses.get(one.name, [])
        runs = _few(use.run for use in uses) or _few(f"linked from {name}" for name in users.get(one.name, []))
        took = one.state.value if one.seconds is None else duration(one.seconds)
        since, size = age(now - one.changed), amount(total_size([one]))
        return [one.stage, one.key, f"{size:>7}", took, since, _few(use.label for use in uses), runs or "–"]

    return table(["stage", "key", "   size", "took", "age", "as", "used by"], [row(one) for one in kept])


def _few(names: Iterable[str]) -> str:
    """The first names, and how many others there are."""
    different = sorted({printable(name) for name in names if name})
    others = len(different) - NAMED
    return ", ".join(different[:NAMED]) + (f" and {others} more" if others > 0 else "")


def _by_stage(kept: Sequence[StoredArtifact]) -> list[str]:
    """Totals of each stage and over all, the largest first."""
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
        yield "everything is used"
    for link in inventory.broken:
        yield f"broken link, its artifact is gone: {printable(link)}"
    for name in inventory.foreign:
        yield f"no artifact, left alone: {printable(name)}"


def _freed(inventory: Inventory, gone: Iterable[StoredArtifact]) -> int:
    """Bytes that are free once these are gone; a file that also belongs to another artifact stays."""
    names = {one.name for one in gone}
    return total_size(inventory.kept.values()) - total_size(k for k in inventory.kept.values() if k.name not in names)


# --- why ---------------------------------------------------------------------------------------------------------


def explain_keys(options: argparse.Namespace) -> int:
    """Prints why two runs share no more."""
    folders = [_run_folder(name, options.output) for name in options.runs]
    comparison = KeyDiff(*map(read_stages, folders))
    both = {**comparison.first, **comparison.second}
    if options.label and options.label not in both:
        raise SelfalignError(f"{options.label}: neither run has such a stage; they have {', '.join(both)}")
    shown = comparison.behind(options.label) if options.label else set(both)
    print("\n".join(why(comparison, [folder.name for folder in folders], shown)))
    return 0


def why(comparison: KeyDiff, names: Sequence[str], shown: Collection[str]) -> Iterator[str]:
    """What differs by itself, in the pipeline's order, and what follows from it.

    Args:
        comparison: of two runs.
        names: theirs.
        shown: the labels to speak of.
    """
    one, other = comparison.first, comparison.second
    causes = comparison.causes(shown)
    roots = {label: news for label, news in causes.items() if news}
    for number, (label, news) in enumerate(roots.items()):
        keys = f"{one[label].stage}/{one[label].key} and {other[label].stage}/{other[label].key}"
        yield f"{label} {'also differs by itself' if number else 'is the first stage that differs'}: {keys}"
        for difference in news:
            derived = " (derived from the run's seed)" if difference.is_seed else ""
            yield f"  {difference.path}{derived}: {comparison.value(difference)}"
    yield from _line("what follows from it", [label for label in causes if label not in roots])
    yield from _line("two keys, but not finished in both runs", [n for n in comparison.unknown if n in shown])
    for here, there, name in ((one, other, names[0]), (other, one, names[1])):
        yield from _line(f"only in {printable(name)}", [n for n in here if n not in there and n in shown])
    same = [label for label in comparison.same if label in shown]
    yield from _line("all the same" if len(same) == len(shown) else "the same", same)


def _line(heading: str, labels: Sequence[str]) -> Iterator[str]:
    if labels:
        yield f"{heading}: {', '.join(map(printable, labels))}"


def _run_folder(name: str, output: Path) -> Path:
    places = [Path(name), output / name]
    found = [place for place in places if (place / "artifacts").is_dir()]
    if not found:
        raise SelfalignError(f"{name!r} is neither a run folder nor the name of a run in {output}")
    return found[0]


# --- clean -------------------------------------------------------------------------------------------------------


def clean_up(options: argparse.Namespace) -> int:
    """Removes what no run uses, once the user has seen it and said yes."""
    inventory = scan_store(options.output)
    unused = inventory.unused(inventory.in_progress)
    if not (unused or inventory.locks):
        print("everything is used; nothing to remove")
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
        print(f"left, as a process has begun to use them: {plural(len(unused) - len(gone), 'artifact')}")
    return 0


def _agreed() -> bool:
    """Asks; only a terminal can answer."""
    if not sys.stdin.isatty():
        raise SelfalignError("nothing was removed: there is no terminal to ask at; --yes removes without being asked")
    try:
        return input("Remove them? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
