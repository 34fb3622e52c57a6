"""Numbers and tables as plain text, for the terminal and the report."""

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """Return rows as lines with aligned columns."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [headings, *rows]]
    return [
        lines[0].rstrip(),
        "  ".join("─" * width for width in widths),
        *(line.rstrip() for line in lines[1:]),
    ]


def plural(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 59.95:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours}\u00a0h {left}\u00a0min" if hours else f"{minutes}\u00a0min {rest}\u00a0s"


def about(seconds: float) -> str:
    """Return an estimated time in words, as coarse as estimates are: whole minutes, from an hour on five at a time."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    if minutes < 60:
        return f"about {minutes} min"
    hours, rest = divmod(5 * round(seconds / 300), 60)
    return f"about {hours} h {rest} min" if rest else f"about {hours} h"


def age(seconds: float) -> str:
    """Return how long ago something was, in its largest unit."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            return plural(int(seconds / size), unit)
    return "now"


def amount(size: int) -> str:
    """Return a number of bytes with three significant digits, in powers of 1000."""
    value, unit = float(size), 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {UNITS[unit]}"


def printable(name: str) -> str:
    """Return a file's name as a terminal can show it: no line breaks, control characters or broken Unicode."""
    return name if name.isprintable() else ascii(name)
