"""The family of commands, and the form that the help of each has."""

import argparse

COMMANDS = {
    "selfalign": "run an experiment, or a sweep of experiments with -m",
    "selfalign-report": "write the report of a run again, follow a run that goes, or compare runs",
    "selfalign-evaluate": "evaluate the models of finished runs, and other models, without training",
    "selfalign-ui": "browse a run's records, chat with its models; needs the extra ui",
    "selfalign-store": "list the artifacts that runs share, explain why two runs do not, remove unused ones",
    "selfalign-workspace": "create a W&B workspace that compares the runs of a project; needs the extra workspace",
}
"""{command: what it does}, in the order in which they are needed."""


def heading(name: str) -> str:
    """Return the first line of a command's help."""
    return f"{name}: {COMMANDS[name]}"


def last_sections(name: str, examples: dict[str, str]) -> str:
    """Return the last sections of a command's help.

    Args:
        name: of the command.
        examples: {command line: what it does}.
    """
    shown = [f"  {line}\n      {meaning}" for line, meaning in examples.items()]
    width = max(map(len, COMMANDS))
    others = [f"  {other:<{width}}  {meaning}" for other, meaning in COMMANDS.items() if other != name]
    return "\n".join(["examples:", *shown, "", "other commands:", *others])


def command_parser(name: str, about: str, examples: dict[str, str]) -> argparse.ArgumentParser:
    """Return the parser of a command other than `selfalign`.

    Its help has the command with what it does, the usage, more about it, arguments and options, examples, and the
    other commands.

    Args:
        name: of the command.
        about: more about it, in lines of at most 100 characters; may be empty.
        examples: {command line: what it does}.
    """
    return _Parser(
        prog=name,
        description=about or None,
        epilog=last_sections(name, examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class _Parser(argparse.ArgumentParser):
    """A parser whose help begins with the command's heading."""

    def format_help(self) -> str:
        return f"{heading(self.prog)}\n\n{super().format_help()}"
