"""Texts put into prompts: literally, and such that none can close the section it stands in."""

import re
from collections.abc import Sequence

from selfalign.errors import SelfalignError


def fill(template: str, values: dict[str, str]) -> str:
    """Puts each value where `{name}` stands in the template, once and literally.

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
    """Breaks up each of the words in a text with a space behind its first letter, whatever their case."""
    present = [word for word in words if word.casefold() in text.casefold()]
    if not present:
        return text
    pattern = re.compile("|".join(re.escape(word) for word in present), re.IGNORECASE)
    return pattern.sub(lambda match: f"{match.group(0)[0]} {match.group(0)[1:]}", text)
