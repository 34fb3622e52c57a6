"""`selfalign-workspace`: a W&B workspace that compares the runs of a project."""

import argparse

from selfalign.cli.environment import set_streams
from selfalign.cli.errors import report_errors
from selfalign.tracking.wandb_workspace import publish


def main() -> None:
    """Builds the workspace of a project, and sends it as a new view where W&B can be reached."""
    set_streams()
    parser = argparse.ArgumentParser(prog="selfalign-workspace", description="A W&B workspace that compares runs.")
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="the project whose runs are compared")
    place = parser.parse_args().project
    entity, _, project = place.partition("/")
    if not entity or not project or "/" in project:
        parser.error(f"expected ENTITY/PROJECT, got {place!r}")
    with report_errors("interrupted; look at the project whether the view is there"):
        print(publish(entity, project))
