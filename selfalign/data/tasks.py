"""Tasks with checks, made from a seed: `shipped:verifiable` and `shipped:verifiable_test`, as many as are wanted.

Every task is a small one: a sum, a choice, a few words about something, each with an answer or constraints that
`data/verifiable.py` checks. Texts and lists are our own. The words of a task decide on which side it is, so no task to
train on is one to test on, whatever the seeds and counts.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed, digest_json
from selfalign.data.text_filters import words_of

NAME = re.compile(r"shipped:verifiable(?P<test>_test)?(:(?P<count>\d+))?(:(?P<seed>\d+))?")
COUNT = 1000
"""Tasks where the source gives no number."""

TEST_SHARE = 4
"""One in so many tasks is one to test on."""

MOST_REPEATS = 2000
"""Draws in a row that give nothing new, after which there is nothing new."""

Row = dict[str, Any]

TOPICS = (
    "bees", "rivers", "bread", "the moon", "winter", "trains", "honey", "libraries", "the sea", "gardens", "clocks",
    "mountains", "soup", "bicycles", "friendship", "rain", "schools", "markets", "music", "horses", "bridges", "tea",
    "forests", "football", "sleep", "islands", "cooking", "stars", "windows", "farms", "birthdays", "paper", "deserts",
    "chess", "shoes", "lighthouses", "apples", "cities", "snow", "elephants",
)  # fmt: skip
WORDS = (
    "river", "golden", "quiet", "morning", "always", "stone", "small", "people", "window", "bright", "slowly", "garden",
    "old", "water", "cold", "many", "hand", "green", "often", "road", "warm", "night", "simple", "wood", "strong",
    "light", "never", "kind", "silver", "long", "autumn", "door", "useful", "sweet", "early", "round", "happy", "deep",
    "new", "soft",
)  # fmt: skip
COMMON = ("the", "and", "is", "of", "a", "in", "it", "are", "to", "very")
OPENINGS = (
    "Well",
    "In short",
    "Of course",
    "Dear reader",
    "To begin with",
    "As you know",
    "Here is a thought",
    "Indeed",
)
ENDINGS = (
    "That is all.", "Thank you for reading.", "I hope this helps.", "Have a good day.", "What do you think?",
    "That is my answer.", "Now you know.", "Take care.",
)  # fmt: skip
KEYS = ("name", "use", "place", "size", "colour", "age", "price", "reason", "season", "sound")
KINDS = {
    "an animal": ("horse", "owl", "trout", "goat", "spider", "whale", "fox", "hen", "beetle", "otter", "frog"),
    "a plant": ("oak", "fern", "tulip", "moss", "maple", "cactus", "nettle", "pine", "ivy", "daisy", "willow"),
    "a tool": ("hammer", "saw", "spade", "drill", "wrench", "chisel", "rake", "pliers", "axe", "screwdriver"),
    "a colour": ("blue", "crimson", "yellow", "purple", "turquoise", "grey", "brown", "pink", "white", "black"),
    "a country": ("France", "Kenya", "Peru", "Japan", "Norway", "Egypt", "Canada", "India", "Chile", "Greece"),
    "a metal": ("iron", "tin", "zinc", "nickel", "aluminium", "lead", "tungsten", "titanium", "chromium"),
    "a piece of furniture": ("chair", "wardrobe", "sofa", "desk", "stool", "bookcase", "bench", "armchair", "cupboard"),
    "an instrument that makes music": ("violin", "flute", "trumpet", "cello", "harp", "oboe", "banjo", "clarinet"),
    "a piece of clothing": ("shirt", "scarf", "trousers", "coat", "skirt", "sock", "jacket", "glove", "hat", "blouse"),
    "a month": ("January", "April", "July", "October", "December", "February", "August", "November", "June"),
}  # fmt: skip
NUMBERS = ("one", "two", "three", "four", "five", "six")


class Draw:
    """Draws that are the same with every version of Python."""

    def __init__(self, seed: int) -> None:
        self._random = Random(derive_seed("verifiable tasks", seed))

    def number(self, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`."""
        return low + int(self._random.random() * (high - low + 1))

    def one(self, of: tuple[str, ...]) -> str:
        """Return one of several."""
        return of[self.number(0, len(of) - 1)]

    def some(self, of: tuple[str, ...], count: int) -> list[str]:
        """Return different ones of several, in an order that is drawn too."""
        left = list(of)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(count)]


# --- templates ---------------------------------------------------------------------------------------------------


def _sum(draw: Draw) -> Row:
    a, b = draw.number(2, 99), draw.number(2, 99)
    return _number(f"What is {a} plus {b}? Reply with the number only.", a + b)


def _difference(draw: Draw) -> Row:
    b, rest = draw.number(2, 50), draw.number(1, 50)
    return _number(f"What is {b + rest} minus {b}? Reply with the number only.", rest)


def _product(draw: Draw) -> Row:
    a, b = draw.number(2, 12), draw.number(2, 20)
    return _number(f"What is {a} times {b}? Reply with the number only.", a * b)


def _larger(draw: Draw) -> Row:
    a, more = draw.number(1, 900), draw.number(1, 90)
    first, second = (a, a + more) if draw.number(0, 1) else (a + more, a)
    return _number(f"Which number is larger, {first} or {second}? Reply with the number only.", a + more)


def _number(text: str, value: int) -> Row:
    return {"category": "number", "instruction": text, "answer": {"kind": "number", "value": value}}


def _choice(draw: Draw) -> Row:
    kind, *others = draw.some(tuple(KINDS), 4)
    right = draw.number(0, 3)
    options = [draw.one(KINDS[other]) for other in others]
    options.insert(right, draw.one(KINDS[kind]))
    listed = "\n".join(f"{letter}) {option}" for letter, option in zip("ABCD", options, strict=True))
    text = f"Which of these is {kind}?\n{listed}\nReply with the letter only."
    return {"category": "choice", "instruction": text, "answer": {"kind": "choice", "value": "ABCD"[right]}}


def _repeat(draw: Draw) -> Row:
    said = " ".join(draw.some(WORDS, draw.number(2, 4)))
    text = f"Repeat these words and write nothing else: {said}"
    return {"category": "exact", "instruction": text, "answer": {"kind": "exact", "value": said}}


def _about(draw: Draw, text: str, *constraints: Row) -> Row:
    """Return a task to write about something, which takes the place of {topic}."""
    asked = text.replace("{topic}", draw.one(TOPICS))
    return {"category": constraints[0]["kind"], "instruction": asked, "constraints": [*constraints]}


def _words(draw: Draw) -> Row:
    low = 5 * draw.number(1, 6)
    high = low + 5 * draw.number(2, 4)
    text = f"Write between {low} and {high} words about {{topic}}."
    return _about(draw, text, {"kind": "words", "at_least": low, "at_most": high})


def _sentences(draw: Draw) -> Row:
    count = draw.number(1, 4)
    text = f"Describe {{topic}} in exactly {NUMBERS[count - 1]} sentence{'s' * (count > 1)}."
    return _about(draw, text, _exactly("sentences", count))


def _paragraphs(draw: Draw) -> Row:
    count = draw.number(2, 3)
    text = f"Write {NUMBERS[count - 1]} short paragraphs about {{topic}}, with a blank line between paragraphs."
    return _about(draw, text, _exactly("paragraphs", count))


def _list(draw: Draw) -> Row:
    count = draw.number(2, 6)
    text = f"List {NUMBERS[count - 1]} things that have to do with {{topic}}. Begin each line with a dash."
    return _about(draw, text, _exactly("list_items", count))


def _exactly(kind: str, count: int) -> Row:
    return {"kind": kind, "at_least": count, "at_most": count}


def _contains(draw: Draw) -> Row:
    words = draw.some(WORDS, 2)
    text = f"Write a sentence about {{topic}} with the words {words[0]} and {words[1]}."
    return _about(draw, text, {"kind": "contains", "phrases": words, "weight": 2}, _exactly("sentences", 1))


def _excludes(draw: Draw) -> Row:
    word, count = draw.one(COMMON), draw.number(1, 3)
    text = f"Write {NUMBERS[count - 1]} sentence{'s' * (count > 1)} about {{topic}} without the word {word}."
    return _about(draw, text, {"kind": "excludes", "phrases": [word], "weight": 2}, _exactly("sentences", count))


def _starts(draw: Draw) -> Row:
    said = draw.one(OPENINGS)
    text = f'Say something about {{topic}}. Begin with "{said}".'
    return _about(draw, text, {"kind": "starts_with", "text": said})


def _ends(draw: Draw) -> Row:
    said = draw.one(ENDINGS)
    return _about(draw, f'Say something about {{topic}}. End with "{said}"', {"kind": "ends_with", "text": said})


def _framed(draw: Draw) -> Row:
    first, last, high = draw.one(OPENINGS), draw.one(ENDINGS), 10 * draw.number(2, 5)
    text = f'Write at most {high} words about {{topic}}. Begin with "{first}" and end with "{last}"'
    ends = ({"kind": "starts_with", "text": first}, {"kind": "ends_with", "text": last})
    return _about(draw, text, {"kind": "words", "at_most": high}, *ends)


def _case(draw: Draw) -> Row:
    kind, how = (("lower_case", "in small letters only"), ("upper_case", "in capital letters only"))[draw.number(0, 1)]
    high = 10 * draw.number(1, 4)
    text = f"Tell me about {{topic}} {how}, with at most {high} words."
    return _about(draw, text, {"kind": kind}, {"kind": "words", "at_most": high})


def _json(draw: Draw) -> Row:
    keys = draw.some(KEYS, draw.number(1, 3))
    named = " and ".join([", ".join(keys[:-1]), keys[-1]] if keys[1:] else keys)
    text = f"Describe {{topic}} as a JSON object with the key{'s' * (len(keys) > 1)} {named}. Write the JSON only."
    return _about(draw, text, {"kind": "json", "keys": keys})


TEMPLATES: tuple[Callable[[Draw], Row], ...] = (
    _sum, _words, _choice, _list, _difference, _contains, _larger, _ends, _repeat, _sentences, _product, _starts, _json,
    _excludes, _case, _framed, _paragraphs,
)  # fmt: skip


# --- the source --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TaskSource:
    """Tasks of one side, the first `count` of those that a seed gives.

    Attributes:
        test: whether they are those to test on.
        count: how many.
        seed: of the draws.
    """

    test: bool
    count: int
    seed: int

    @classmethod
    def parse(cls, source: str) -> "TaskSource | None":
        """Return what "shipped:verifiable:COUNT:SEED" names, or the same with verifiable_test; None for another source.

        Raises:
            SelfalignError: it begins so, and goes on in another way.
        """
        found = NAME.fullmatch(source)
        if found is None and source.startswith("shipped:verifiable"):
            raise SelfalignError(
                f"{source}: expected shipped:verifiable or shipped:verifiable_test, maybe with :COUNT or :COUNT:SEED"
            )
        return found and cls(bool(found["test"]), int(found["count"] or COUNT), int(found["seed"] or 0))

    @property
    def rows(self) -> list[Row]:
        """The tasks as rows, each with a category, of all kinds in turn as long as there are new ones.

        Raises:
            SelfalignError: there are not so many.
        """
        return _make(self)

    @property
    def digest(self) -> str:
        """What the tasks count as in keys: their content."""
        return digest_json(self.rows)

    def placed(self, source: str) -> Iterator[tuple[str, Row]]:
        """Yield the rows with their places."""
        yield from ((f"{source} row {index}", row) for index, row in enumerate(self.rows))


@cache
def _make(source: TaskSource) -> list[Row]:
    """Return the tasks of a source. They are made once a process."""
    draw, drawn, known, rows, repeats = Draw(source.seed), set[str](), set[str](), list[Row](), 0
    while len(rows) < source.count:
        turn = draw.number(0, len(TEMPLATES) - 1) if repeats else len(rows) % len(TEMPLATES)
        row = TEMPLATES[turn](draw)
        text, repeats = row["instruction"], repeats + 1
        if text not in drawn:
            drawn.add(text)
            words = digest_json(words_of(text))
            if words not in known and (int(words[:8], 16) % TEST_SHARE == 0) == source.test:
                known.add(words)
                rows.append(row)
                repeats = 0
        if repeats > MOST_REPEATS:
            raise SelfalignError(f"there are only {len(rows)} verifiable tasks of this seed, not {source.count}")
    return rows
