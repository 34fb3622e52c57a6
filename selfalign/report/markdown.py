"""Pieces of GitHub-flavoured Markdown. Texts of users and models stand in code, where nothing is markup."""

import re
from collections.abc import Sequence


def code(text: object) -> str:
    """Return a text as a code span on one line."""
    line = " ".join(str(text).split())
    fence = "`" * (longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}" if line else "(empty)"


def fenced(text: str, language: str = "") -> str:
    """Return a text as a code block."""
    fence = "`" * max(3, longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def longest_run(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of selfalign's own words and numbers; the first row holds the headings."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def folded(summary: str, body: str) -> str:
    """Return Markdown that is shown on demand."""
    return f"<details>\n<summary>{summary}</summary>\n\n{body}\n\n</details>"
