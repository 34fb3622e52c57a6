import sys

import pytest
from markdown_it import MarkdownIt
from mutation import assert_caught

from selfalign.report import markdown
from selfalign.report.markdown import bullets, code, fenced, folded, table

HOSTILE = [
    "plain",
    "`",
    "``a`` and ```b```",
    "`start and end`",
    "a *b* _c_ [d](e) ![f](g) <script>alert(1)</script> &amp; \\",
    "two\nlines\n\n# and a heading\n- and a list",
    "~~~\n```\n</details>\n\n# out\n",
]


def parsed(text: str) -> list[tuple[str, str]]:
    """(kind, content) of the leaves that a Markdown reader sees."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    leaves = [leaf for token in tokens for leaf in (token.children or [token])]
    return [(leaf.type, leaf.content) for leaf in leaves if leaf.content]


def test_text_in_a_code_span_is_only_that() -> None:
    for text in HOSTILE:
        assert parsed(f"- A text: {code(text)}") == [("text", "A text: "), ("code_inline", " ".join(text.split()))]


def test_text_in_a_code_block_is_only_that() -> None:
    for text in HOSTILE:
        assert parsed(fenced(text, "yaml")) == [("fence", text.rstrip() + "\n")]


def test_nothing_is_said_to_be_empty() -> None:
    assert code(" \n") == "(empty)"


def test_bars_do_not_split_a_cell() -> None:
    cells = [content for kind, content in parsed(table([["a", "P(x|y)"], ["1", "2"]])) if kind == "text"]
    assert cells == ["a", "P(x|y)", "1", "2"]


def test_folded_markdown_is_still_markdown() -> None:
    kinds = [kind for kind, _ in parsed(folded("More", bullets([code("x"), "y"])))]
    assert kinds == ["html_block", "code_inline", "text", "html_block"]


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ('fence = "`" * (longest_run(line) + 1)', 'fence = "`"', test_text_in_a_code_span_is_only_that),
        ('line = " ".join(str(text).split())', "line = str(text)", test_text_in_a_code_span_is_only_that),
        ('pad = " " if', 'pad = "" if', test_text_in_a_code_span_is_only_that),
        ('fence = "`" * max(3, longest_run(text) + 1)', 'fence = "```"', test_text_in_a_code_block_is_only_that),
        ("chr(92) + '|'", "'|'", test_bars_do_not_split_a_cell),
    ],
    ids=["short fence", "several lines", "no padding", "short block", "bare bar"],
)
def test_mutant_is_caught(old: str, new: str, check: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_caught(markdown, sys.modules[__name__], old, new, check, {"monkeypatch": monkeypatch})  # pyright: ignore
