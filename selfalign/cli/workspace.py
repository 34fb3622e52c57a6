"""`selfalign-workspace`: create a W&B workspace that compares the runs of a project."""

from selfalign.cli.commands import command_parser
from selfalign.cli.environment import set_streams
from selfalign.cli.errors import report_errors
from selfalign.tracking.wandb_workspace import publish


def main() -> None:
    """Create the workspace of a project and send it as a new view, if W&B can be reached."""
    set_streams()
    parser = command_parser("selfalign-workspace", "", {"selfalign-workspace me/selfalign": "of one project"})
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="the project whose runs are compared")
    name = parser.parse_args().project
    entity, _, project = name.partition("/")
    if not entity or not project or "/" in project:
        parser.error(f"expected ENTITY/PROJECT, got {name!r}")
    with report_errors("interrupted; check in the project whether the view was created"):
        print(publish(entity, project))
