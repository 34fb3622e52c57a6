import unicodedata

import pytest

from selfalign.data.sources import read_demonstrations, read_instructions
from selfalign.data.text_filters import Language, is_fragment, words_of
from selfalign.metrics.intervals import repetition


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert words_of("Don't stop: “Ça va”, 3 times!") == ["don", "t", "stop", "ça", "va", "3", "times"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("请用三句话解释AI。", ["请", "用", "三", "句", "话", "解", "释", "ai"]),
        ("コーヒー・です", ["コ", "ー", "ヒ", "ー", "で", "す"]),
        ("ว่าทำ", ["ว่", "า", "ท", "ำ"]),
        ("आकाश नीला क्यों", ["आकाश", "नीला", "क्यों"]),
        ("اشْرَحْ لِمَاذَا", ["اشْرَحْ", "لِمَاذَا"]),
        ("한국어 문장", ["한국어", "문장"]),
    ],
)
def test_words_of_any_script_are_whole_and_a_script_without_spaces_has_one_a_character(
    text: str, words: list[str]
) -> None:
    assert words_of(text) == words


def test_words_are_the_same_however_accents_are_encoded() -> None:
    text = "Giải thích tại sao"
    assert words_of(unicodedata.normalize("NFD", text)) == words_of(text) == ["giải", "thích", "tại", "sao"]


def test_answer_that_repeats_itself_is_seen_in_a_script_without_spaces() -> None:
    assert repetition([words_of("我喜欢吃苹果" * 10)], 4) == pytest.approx(1 - 6 / 57)


@pytest.mark.parametrize(
    "text",
    [
        "12 + 30 = ?",
        "… 3, 4",
        "1.",
        "- Name a bird that cannot fly",
        "• Name a bird that cannot fly",
        "2. Name a bird that cannot fly",
        "(3) Name a bird that cannot fly",
        "b) Name a bird that cannot fly",
        ", and then say which one is older.",
        "): say which one is older",
        "Translate this into Spanish:",
        "Name a bird, a fish,",
        "请把下面的句子翻译成英语：",
        "Explain what a comet is (",
        "Task 3",
        "Task 3 Name a bird that cannot fly",
        "Name a bird that cannot fly.\n**Task 11**",
        "Name a bird that cannot fly.\nTask",
        "\n Name a bird that cannot fly;\n",
    ],
)
def test_piece_of_something_is_a_fragment(text: str) -> None:
    assert is_fragment(text)


@pytest.mark.parametrize(
    "text",
    [
        "Name a bird that cannot fly.",
        "Sort these:\n- pear\n- apple",
        "5.5 litres are how many pints?",
        "E. coli doubles how fast?",
        "“Carpe diem” means what?",
        "-5 degrees Celsius is how much in Fahrenheit?",
        "I have a plan for Task 3. What is missing?",
        "Tasks pile up on my desk. What helps?",
        ".NET or Java: which is older?",
        "Say hello (in French)",
    ],
)
def test_whole_instruction_is_no_fragment(text: str) -> None:
    assert not is_fragment(text)


def seeds() -> list[str]:
    return [str(d.prompt[0]["content"]) for d in read_demonstrations("shipped:ift")[0]]  # pyright: ignore


def test_no_shipped_instruction_is_taken_for_a_fragment_or_for_another_language() -> None:
    others = [i.text for name in ("evaluation", "ranked") for i in read_instructions(f"shipped:{name}", "any")[0]]
    assert len(others) == 152
    assert [text for text in seeds() + others if is_fragment(text)] == []
    for count in (24, 40, 168):
        language = Language.of(seeds()[:count])
        assert language.scripts == {"LATIN"}
        assert len(language.common) > 30
        assert [text for text in others if language.differs(text)] == []


FOREIGN = [
    "Объясни, как пчёлы находят дорогу домой.",
    "解释一下蜜蜂如何找到回家的路。",
    "Translate: 我每天早上都喝一杯绿茶然后去公园散步",
    "Explique comment les abeilles retrouvent le chemin de leur ruche.",
    "Escreva um pequeno poema sobre relógios antigos.",
]


@pytest.mark.parametrize("text", FOREIGN)
def test_other_script_or_no_common_word_is_another_language(text: str) -> None:
    assert Language.of(seeds()).differs(text)


@pytest.mark.parametrize(
    "text",
    [
        "Translate “доброе утро” into English.",
        "What does the letter π stand for?",
        "Name edible wild mushrooms.",
        "Solve 3x + 5 = 20.",
        "",
    ],
)
def test_few_foreign_letters_and_few_words_are_none(text: str) -> None:
    assert not Language.of(seeds()).differs(text)


def test_language_is_that_of_the_seeds_not_english() -> None:
    russian = Language.of([f"Объясни, как работает {thing}, и приведи пример." for thing in "абвгдежзиклмнопрсту"])
    assert russian.scripts == {"CYRILLIC"}
    assert russian.differs("Explain how bees find their way home.")
    assert not russian.differs("Объясни, как пчёлы находят дорогу домой.")


def test_few_or_unlike_texts_teach_no_common_words() -> None:
    few = Language.of(seeds()[:19])
    unlike = Language.of([f"w{n}a w{n}b w{n}c" for n in range(40)])
    assert few.common == unlike.common == frozenset()
    assert not few.differs(FOREIGN[3])
    assert few.differs(FOREIGN[0])


def test_without_texts_every_language_passes() -> None:
    assert not any(Language.of([]).differs(text) for text in FOREIGN)
