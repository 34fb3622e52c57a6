"""Arena-Hard-Auto v2.0: compare answers with a baseline's by five verdicts, also at equal style (arXiv 2406.11939)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfalign.benchmarks.arena_judge import ArenaJudge, Game
from selfalign.benchmarks.fastchat import Question, write_lines
from selfalign.benchmarks.multi_turn import Conversation, converse
from selfalign.benchmarks.protocol import BenchmarkContext, check_count
from selfalign.benchmarks.style import FEATURES, style_differences, style_of
from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_text
from selfalign.core.records import Instruction
from selfalign.data.containers import identify_data, read_rows
from selfalign.data.rows import Row, is_blank, shown
from selfalign.data.thinking import given_response
from selfalign.engines.protocol import Sampling
from selfalign.judges.comparator import mean_length
from selfalign.judges.comparisons import ResponsePair
from selfalign.metrics import catalog
from selfalign.metrics.intervals import Floats, bootstrap_share, style_controlled
from selfalign.store.artifacts import Counts, StageOutput

STRONG_WEIGHT = 3
"""How often a verdict counts by which one answer is better by far."""

PUBLISHED = "o3-mini-2025-01-31 for hard_prompt and gemini-2.0-flash-001 for creative_writing"
"""The baselines of Arena-Hard-Auto v2.0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArenaQuestion:
    """A line of question.jsonl."""

    uid: str
    category: str
    prompt: str
    subcategory: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArenaAnswer:
    """A line of model_answer/MODEL.jsonl. Its `metadata` is not read, so that both answers are counted in one way."""

    uid: str
    messages: list[dict[str, Any]]
    model: str = ""


@dataclass(kw_only=True, slots=True)
class ArenaHard:
    """Compare each answer with the baseline's in both orders, by one of five verdicts.

    `win_rate_weighted` is the share of the verdicts for the model: a tie counts half, and a verdict by which one answer
    is better by far counts three times, as in arena-hard-auto. `win_rate_style_controlled` is the rate at equal
    length and markdown, by the model of `selfalign.metrics.intervals.style_controlled`. Both are also given for each
    category, and have intervals over questions.
    Differs from arena-hard-auto: a rate is that of the verdicts there are, not the mean of its resamples; intervals are
    of 95 %, not 90 %, and over questions, not over verdicts; tokens are those of the model's own tokenizer; and there
    are numbers over all categories, too, whose baselines may be different ones.

    Attributes:
        questions: a data source in the format of question.jsonl: `uid`, `category`, `prompt`.
        baselines: {category: a data source of the baseline's answers}, in the format of model_answer/MODEL.jsonl:
            `uid`, and `messages` that end with the answer.
        categories: the categories to ask; empty asks all.
        count: the number of questions, taken from the beginning; 0 takes all.
        sampling: of the answers.
        judge: compares the answers.
    """

    questions: str
    judge: ArenaJudge
    baselines: dict[str, str] = field(default_factory=dict)
    categories: list[str] = field(default_factory=list)
    count: int = 0
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def judge_model(self) -> str | None:
        """The policy that compares; None for a server."""
        return None if self.judge.endpoint.base_url else self.judge.model

    @property
    def size(self) -> str:
        """The questions and the judge, for the plan."""
        judge = self.judge_model or self.judge.endpoint.model
        return f"{self.count or 'all'} questions of {self.questions}, both orders, judged by {judge}"

    def check(self, key: str) -> None:
        """Check the settings. The judge has checked its own. Messages name a setting as `key`.name."""
        if self.count < 0:
            raise SelfalignError(f"{key}.count must be 0 (all) or more, got {self.count}")
        self.sampling.check(f"{key}.sampling")

    def sources(self, key: str) -> dict[str, str]:
        """Return the digests of the questions and of the baselines' answers, after reading each once."""
        digests = {"questions": identify_data(self.questions, f"{key}.questions")}
        questions = self._questions(key)
        for category in dict.fromkeys(question.category for question in questions):
            setting = f"{key}.baselines.{category}"
            digests[f"baselines.{category}"] = identify_data(self._baseline(category, key), setting)
        self._answers(questions, key)
        return digests

    def asked(self, key: str) -> list[str]:
        """Return the prompts."""
        return [question.prompt for question in self._questions(key)]

    def measure(self, context: BenchmarkContext, out: StageOutput) -> Counts:
        """Write model_answer/MODEL.jsonl and model_judgment/JUDGE/MODEL.jsonl as arena-hard-auto does.

        The answers have no `metadata`, which its own utils/add_markdown_info.py adds. Return the metrics.
        """
        questions, model = self._questions(context.key), context.name
        baselines = self._answers(questions, context.key)
        asked = [Question(question_id=one.uid, category=one.category, turns=[one.prompt]) for one in questions]
        talks = converse(context, out, asked, lambda question: self.sampling)
        answered = [(one, talk) for one, talk in zip(questions, talks, strict=True) if talk.answers]
        write_lines(out.path / "model_answer" / f"{model}.jsonl", [answer_line(*one, model) for one in answered])
        pairs = [response_pair(one, talk, model, *baselines[one.uid]) for one, talk in answered]
        with out.journal(2 * len(pairs), "verdicts") as journal, context.judge_context(journal) as judge_context:
            games, counts = self.judge.play(judge_context, pairs, out.label)
        counts |= judge_context.counts
        name = context.name_of_judge(self.judge.model, self.judge.endpoint)
        rows = [
            judgement_line(one, both, name, model, pair.second.model)
            for (one, _), both, pair in zip(answered, games, pairs, strict=True)
        ]
        write_lines(out.path / "model_judgment" / name / f"{model}.jsonl", rows)
        tokenizer = context.policy.load_tokenizer()
        styles = [[style_of(tokenizer, text) for text in (pair.first.text, pair.second.text)] for pair in pairs]
        differences = style_differences([own for own, _ in styles], [other for _, other in styles])
        categories = [one.category for one, _ in answered]
        return counts | {
            catalog.BENCHMARK_QUESTIONS.own: len(questions),
            **rates(categories, games, differences),
            catalog.JUDGE_POSITION_BIAS.name: position_bias(games),
            catalog.BENCHMARK_FINISHED_SHARE.own: sum(talk.finished[0] for _, talk in answered) / len(answered),
            catalog.MEAN_CHARACTERS.name: mean_length([pair.first for pair in pairs]),
            catalog.MEAN_CHARACTERS_OPPONENT.name: mean_length([pair.second for pair in pairs]),
            "dropped": {"unanswered": len(questions) - len(answered), **counts["dropped"]},
        }

    def _questions(self, key: str) -> list[ArenaQuestion]:
        """Return the questions of the wanted categories.

        Raises:
            SelfalignError: a line is no question, two have one id, or there are fewer than asked for.
        """
        questions: dict[str, ArenaQuestion] = {}
        for where, raw in read_rows(self.questions):
            row = Row.of(where, raw)
            question = row.typed(ArenaQuestion)
            if any(map(is_blank, (question.uid, question.category, question.prompt))):
                row.refuse("expected a uid, a category and a prompt, each a non-empty text; one is empty")
            if questions.setdefault(question.uid, question) is not question:
                row.refuse(f"the uid {question.uid!r} occurs twice")
        known = list(dict.fromkeys(question.category for question in questions.values()))
        if unknown := [category for category in self.categories if category not in known]:
            raise SelfalignError(f"{key}.categories: {self.questions} has no {unknown[0]!r}, only {', '.join(known)}")
        wanted = [one for one in questions.values() if one.category in (self.categories or known)]
        check_count(key, self.count, len(wanted), self.questions)
        return wanted[: self.count or None]

    def _baseline(self, category: str, key: str) -> str:
        """Return the source of the baseline's answers in a category.

        Raises:
            SelfalignError: none is set.
        """
        if not (source := self.baselines.get(category)):
            raise SelfalignError(
                f"{key}.baselines.{category} must name the baseline's answers in this category, a file of "
                f"model_answer/ (arena-hard-auto v2.0 takes {PUBLISHED}); or choose other {key}.categories"
            )
        return source

    def _answers(self, questions: Sequence[ArenaQuestion], key: str) -> dict[str, tuple[str, str]]:
        """Return {uid: (the baseline's answer, its model)}.

        Raises:
            SelfalignError: a category has no baseline, or a question no answer.
        """
        read: dict[str, dict[str, tuple[str, str]]] = {}
        answers: dict[str, tuple[str, str]] = {}
        for question in questions:
            source = self._baseline(question.category, key)
            if source not in read:
                read[source] = read_answers(source)
            if question.uid not in read[source]:
                raise SelfalignError(
                    f"{key}.baselines.{question.category}: {source} has no answer to the question {question.uid!r} of "
                    f"{self.questions}; give a file with the answers to all questions"
                )
            answers[question.uid] = read[source][question.uid]
        return answers


def read_answers(source: str) -> dict[str, tuple[str, str]]:
    """Return {uid: (answer, model)} of a source in the format of model_answer/MODEL.jsonl.

    Raises:
        SelfalignError: a line has no answer, or repeats a question; file and line are named.
    """
    answers: dict[str, tuple[str, str]] = {}
    for where, raw in read_rows(source):
        row = Row(where, raw)  # Its messages are objects of arena-hard-auto's own form.
        answer = row.typed(ArenaAnswer)
        last = answer.messages[-1] if answer.messages else {}
        content = last.get("content")
        text = content.get("answer") if isinstance(content, dict) else content
        if last.get("role") != "assistant" or not isinstance(text, str):
            row.refuse(
                f"messages must end with the assistant's answer, a text or {{'answer': text}}; got {shown(text)}"
            )
        if answer.uid in answers:
            row.refuse(f"a second answer to the question {answer.uid!r}")
        answers[answer.uid] = (text, answer.model or "baseline")
    return answers


def response_pair(question: ArenaQuestion, talk: Conversation, model: str, answer: str, baseline: str) -> ResponsePair:
    """Return the pair of the model's answer and the baseline's."""
    instruction = Instruction(id=question.uid, text=question.prompt, source="evaluation", category=question.category)
    first = given_response(f"{question.uid}-{model}", question.uid, talk.answers[0], model)
    second = given_response(f"{question.uid}-{baseline}-baseline", question.uid, answer, baseline)
    return ResponsePair(instruction, first, second)


def rates(categories: Sequence[str], games: Sequence[tuple[Game, Game]], differences: Floats) -> Counts:
    """Return the rates of all questions and of each category, and what a difference in style does.

    Args:
        categories: category of each question.
        games: both games of each question; questions without both verdicts are left out.
        differences: differences in style, shape (questions, features).
    """
    parts = {index: verdicts_won(both) for index, both in enumerate(games) if all(game.verdict for game in both)}
    counts: Counts = {}
    several = sorted(set(categories)) if len(set(categories)) > 1 else []
    for category in ("", *several):
        chosen = [index for index in parts if category in ("", categories[index])]
        if not chosen:
            continue
        won, played = zip(*(parts[index] for index in chosen), strict=True)
        plain = bootstrap_share([parts[index] for index in chosen])
        shares = [one / all_ for one, all_ in zip(won, played, strict=True)]
        styled, effects = style_controlled(shares, played, differences[chosen])
        if category:
            counts |= plain.known(catalog.BENCHMARK_WEIGHTED_WIN_RATE_IN.of(category=category).own)
            counts |= styled.known(catalog.BENCHMARK_STYLE_WIN_RATE_IN.of(category=category).own)
        else:
            counts |= plain.known(catalog.BENCHMARK_WEIGHTED_WIN_RATE.own)
            counts |= styled.known(catalog.BENCHMARK_STYLE_WIN_RATE.own)
            named = zip(FEATURES, effects, strict=True)
            counts |= {catalog.BENCHMARK_STYLE_EFFECT.of(feature=name).own: effect for name, effect in named}
    return counts


def verdicts_won(both: tuple[Game, Game]) -> tuple[float, float]:
    """Return how many verdicts the model won, and of how many, in its game as A and its game as B."""
    won = played = 0.0
    for game, is_first in zip(both, (True, False), strict=True):
        assert game.verdict is not None
        weight = STRONG_WEIGHT if game.verdict.is_strong else 1
        won += weight * (game.verdict.score if is_first else 1 - game.verdict.score)
        played += weight
    return won, played


def position_bias(games: Sequence[tuple[Game, Game]]) -> float:
    """Return the share of questions with two verdicts in which the same position won in both orders."""
    scores = [
        (first.verdict.score, second.verdict.score)
        for first, second in games
        if first.verdict is not None and second.verdict is not None
    ]
    return sum(first == second != 0.5 for first, second in scores) / len(scores)


def answer_line(question: ArenaQuestion, talk: Conversation, model: str) -> Mapping[str, Any]:
    """Return a line of model_answer/MODEL.jsonl; the answer's id is the digest of model, question and text."""
    answer = talk.answers[0]
    return {
        "uid": question.uid,
        "ans_id": digest_text("\n".join([model, question.uid, answer]))[:22],
        "model": model,
        "messages": [
            {"role": "user", "content": question.prompt},
            {"role": "assistant", "content": {"answer": answer}},
        ],
    }


def judgement_line(
    question: ArenaQuestion, both: tuple[Game, Game], judge: str, model: str, baseline: str
) -> Mapping[str, Any]:
    """Return a line of model_judgment/JUDGE/MODEL.jsonl. The baseline is A in the first of its games, as there."""
    as_first, as_second = both
    return {
        "uid": question.uid,
        "category": question.category,
        "judge": judge,
        "model": model,
        "baseline": baseline,
        "games": [
            {"score": game.verdict, "judgment": {"answer": game.text}, "status": game.status}
            for game in (as_second, as_first)
        ],
    }
