"""Texts put into prompts, literally, so that none can close the section it stands in."""

import re
from collections.abc import Sequence

from selfalign.core.errors import SelfalignError

BRACED = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})+|(?<![\w^$])(\{+)( *)([A-Za-z_]\w*)( *)(\}+)")
"""A name in braces, which is a placeholder unless a LaTeX command or a shell's `$` stands before it."""


def check_template(template: str, key: str, needed: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Check that a template has every placeholder it needs and no unknown one.

    Braces around anything but a name, such as those of JSON, and around a name with spaces beside it stay as they are.

    Args:
        template: the text.
        key: the setting, or the file and the place in it.
        needed: the placeholders it must have.
        optional: those it may have.

    Raises:
        SelfalignError: with a line for every fault.
    """
    known = [*needed, *optional]
    allowed = f"allowed: {', '.join(f'{{{name}}}' for name in known) or 'none'}"
    faults = [f"{key} lacks {{{name}}}" for name in needed if f"{{{name}}}" not in template]
    for found in BRACED.finditer(template):
        opening, before, name, after, closing = found.groups()
        if name is None:
            continue
        if len(opening) > 1 and len(closing) > 1:
            faults.append(f"{key}: placeholders stand in single braces, got {found[0]}; {allowed}")
        elif not (before or after or name in known):
            faults.append(
                f"{key}: unknown placeholder {{{name}}}; {allowed}. Literal braces have spaces inside: {{ {name} }}"
            )
    if faults:
        raise SelfalignError("\n".join(dict.fromkeys(faults)))


def fill(template: str, values: dict[str, str]) -> str:
    """Replace each `{name}` in the template by its value, once and literally.

    Braces inside a value stay as they are. A value that spells one of the template's own tags (`<response>`,
    `</response>`, …) has it broken up, so that no text can close the section it stands in.

    Raises:
        SelfalignError: the template lacks one of the names.
    """
    for name in values:
        if f"{{{name}}}" not in template:
            raise SelfalignError(f"the prompt template lacks {{{name}}}")
    tags = sorted(set(re.findall(r"</?[A-Za-z_]+>", template)))
    pattern = "|".join(re.escape(f"{{{name}}}") for name in values)
    return re.sub(pattern, lambda match: break_up(values[match.group(0)[1:-1]], tags), template)


def break_up(text: str, words: Sequence[str]) -> str:
    """Put a space after the first letter of each of the words wherever a text has them, whatever their case."""
    present = [word for word in words if word.casefold() in text.casefold()]
    if not present:
        return text
    pattern = re.compile("|".join(re.escape(word) for word in present), re.IGNORECASE)
    return pattern.sub(lambda match: f"{match.group(0)[0]} {match.group(0)[1:]}", text)
