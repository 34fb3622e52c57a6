"""`selfalign-ui`: look at runs in a browser, compare answers, and chat with their models."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from selfalign.cli.commands import command_parser
from selfalign.cli.environment import set_environment, set_messages, set_streams
from selfalign.cli.errors import report_errors
from selfalign.core.errors import SelfalignError

ABOUT = """Every RUN is a run folder, of a finished, failed or running run. The page shows its records with their
lineage, the answers of two runs side by side, and a chat with one model or two. A vote between two
replies is added to a file of preference pairs. The page listens on this machine alone unless --host
says otherwise."""

EXAMPLES = {
    "selfalign-ui outputs/demo-1a2b3c4d": "look at a run, and chat with its models",
    "selfalign-ui outputs/demo-1a2b3c4d outputs/demo-5e6f7a8b": "compare the answers of two runs",
    "selfalign-ui outputs/demo-1a2b3c4d --votes votes.jsonl": "add votes to a file of preference pairs",
}

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main() -> None:
    """Run the command line.

    Exit codes: 0; 1 for an error that the user can correct, or a bug; 2 for a wrong option; 130 for Ctrl-C.
    """
    set_environment()
    set_streams()
    options = parser().parse_args()
    with report_errors("stopped"):
        show(options.runs, options.host, options.port, options.votes)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = command_parser("selfalign-ui", ABOUT, EXAMPLES)
    found.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder")
    found.add_argument("--host", default=LOOPBACK[0], help="address to listen on (default: %(default)s)")
    found.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    votes = "file that votes are added to (default: votes.jsonl in the first RUN)"
    found.add_argument("--votes", metavar="FILE", type=Path, help=votes)
    return found


def show(runs: list[Path], host: str, port: int | None, votes: Path | None) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        SelfalignError: Gradio is missing, a RUN is no run, or the address cannot be listened on.
    """
    if find_spec("gradio") is None:
        raise SelfalignError("selfalign-ui needs Gradio: pip install 'selfalign[ui]'")
    set_messages()
    # These import torch and Gradio, which --help should not wait for.
    from selfalign.ui.run_records import open_runs

    opened = open_runs(runs)
    from selfalign.ui.page import Explorer, serve

    if host not in LOOPBACK:
        print(f"warning: whoever reaches {host} can read these runs and use their models; there is no password")
    serve(Explorer(opened, votes or runs[0] / "votes.jsonl"), host, port)
