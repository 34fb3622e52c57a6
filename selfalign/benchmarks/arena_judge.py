"""Arena-Hard's judge: it says which of two answers is better, and whether by far (arXiv 2406.11939)."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Self

from selfalign.core.errors import SelfalignError
from selfalign.core.records import FinishReason, JudgementStatus
from selfalign.data.turns import as_prompt
from selfalign.judges.comparator import OPENING, ComparatorSettings, unasked, written
from selfalign.judges.comparisons import OrderedPair, ResponsePair
from selfalign.judges.expected import distribution
from selfalign.judges.parsing import read_bracketed
from selfalign.judges.protocol import JudgeContext
from selfalign.judges.unread import Unread
from selfalign.judges.verdict_text import other_choices
from selfalign.models.tokenizer import encode_prompt
from selfalign.store.artifacts import Counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

CLOSING = "]]"


class ArenaVerdict(StrEnum):
    """Which of two answers, A shown first and B second, is better: by far (`>>`), a little (`>`), or neither."""

    A_BY_FAR = "A>>B"
    A = "A>B"
    TIE = "A=B"
    B = "B>A"
    B_BY_FAR = "B>>A"

    @property
    def score(self) -> float:
        """1 if A is better, 0 if B is, ½ for a tie."""
        return 0.5 if self is ArenaVerdict.TIE else float(self.value.startswith("A"))

    @property
    def is_strong(self) -> bool:
        """Whether one answer is better by far."""
        return ">>" in self.value


SPELLINGS = {verdict.value: verdict for verdict in ArenaVerdict} | {
    "B=A": ArenaVerdict.TIE,
    "B<A": ArenaVerdict.A,
    "B<<A": ArenaVerdict.A_BY_FAR,
    "A<B": ArenaVerdict.B,
    "A<<B": ArenaVerdict.B_BY_FAR,
}
"""{how a judge may write a verdict: the verdict}."""

VERDICT = re.compile(rf"\[\[({'|'.join(map(re.escape, SPELLINGS))})\]\]")


@dataclass(frozen=True, slots=True)
class Game:
    """A judge's verdict on two answers in one order. There is a verdict exactly when `status` is ok."""

    status: JudgementStatus
    verdict: ArenaVerdict | None
    text: str


@dataclass(frozen=True, slots=True)
class VerdictTokens:
    """How a tokenizer writes the verdicts behind `[[`.

    Attributes:
        paths: the tokens of each verdict with its `]]`, in the order of `ArenaVerdict`.
        forks: beginnings of verdicts that go on in several ways, as tokens.
        alternatives: all tokens that follow a fork.
    """

    paths: list[list[int]]
    forks: list[list[int]]
    alternatives: list[int]

    @classmethod
    def of(cls, tokenizer: "Tokenizer", key: str) -> Self:
        """Return the verdict tokens of a tokenizer.

        Raises:
            SelfalignError: it does not read the same verdicts behind every prompt; the message names `key`.model.
        """
        prompt = as_prompt("x")
        before = encode_prompt(tokenizer, prompt, OPENING)
        whole = [encode_prompt(tokenizer, prompt, OPENING + verdict + CLOSING) for verdict in ArenaVerdict]
        if any(ids[: len(before)] != before for ids in whole):
            raise SelfalignError(
                f"{key}.model: its tokenizer joins {OPENING} with the verdict behind it. Choose another judge model."
            )
        paths = [ids[len(before) :] for ids in whole]
        beginnings = {tuple(path[:length]) for path in paths for length in range(len(path))}
        forks = [list(begun) for begun in sorted(beginnings) if len(followers(paths, begun)) > 1]
        return cls(paths, forks, sorted({token for fork in forks for token in followers(paths, fork)}))

    def shares(self, rows: Sequence[Sequence[float]]) -> list[float]:
        """Return the probability of each verdict for a judge that can write nothing else.

        Args:
            rows: log p of the alternatives behind each fork.
        """
        logps = [0.0] * len(self.paths)
        for fork, row in zip(self.forks, rows, strict=True):
            tokens = followers(self.paths, fork)
            chances = distribution([row[self.alternatives.index(token)] for token in tokens])
            for index, path in enumerate(self.paths):
                if path[: len(fork)] == fork:
                    chance = chances[tokens.index(path[len(fork)])]
                    logps[index] += math.log(chance) if chance else -math.inf
        return [math.exp(logp) for logp in logps]


def followers(paths: Sequence[Sequence[int]], begun: Sequence[int]) -> list[int]:
    """Return the tokens that follow a beginning in the paths that begin so."""
    return sorted({p[len(begun)] for p in paths if len(p) > len(begun) and list(p[: len(begun)]) == list(begun)})


@dataclass(kw_only=True, slots=True)
class ArenaJudge(ComparatorSettings):
    """The judge that compares a model's answers with the baseline's, with one of five verdicts in each order.

    A server writes greedily, and `[[A>>B]]`, `[[A>B]]`, `[[A=B]]`, `[[B>A]]` or `[[B>>A]]` is read from its text. A
    policy's verdict is the likeliest of the five if it could write nothing else, so that even a small model gives one.
    Differs from Arena-Hard-Auto, which takes the last verdict of a text: here, different verdicts in one text are
    ambiguous, and count as none.
    """

    model: str = "sft"
    verdict_tokens: int = 2048
    key: ClassVar[str] = "benchmark.arena_hard.judge"
    forms: ClassVar[tuple[str, ...]] = ("[[A>B]]", "[[B>A]]")

    def play(
        self, context: JudgeContext, pairs: Sequence[ResponsePair], label: str
    ) -> tuple[list[tuple[Game, Game]], Counts]:
        """Compare each pair in both orders.

        Args:
            context: the context of the judge.
            pairs: one pair for each question.
            label: name of the comparison in messages.

        Returns:
            For each pair the game with its first response shown first, and the one with its second; and the counts of
            the server, and of pairs without a verdict in one of the orders by reason, under "dropped".

        Raises:
            SelfalignError: too many pairs have no verdict.
        """
        counts: Counts = {}
        orders = [OrderedPair(pair, swapped) for pair in pairs for swapped in (False, True)]
        read = self._ask if self.endpoint.base_url else self._read
        played = read(context, orders, counts)
        games = list(zip(played[::2], played[1::2], strict=True))
        failures = [next((g for g in both if g.verdict is None), None) for both in games]
        unread = Unread()
        unread.add((game.status, game.text) for game in failures if game is not None)
        self.check_failures(unread, len(pairs), label)
        return games, counts | {"dropped": dict(sorted(unread.reasons.items()))}

    def _ask(self, context: JudgeContext, orders: Sequence[OrderedPair], counts: Counts) -> list[Game]:
        """Return the verdicts that a server writes."""
        return [
            parse_game(reply.text, reply.finish_reason, ordered.texts)
            for reply, ordered in zip(self._replies(context, orders, counts), orders, strict=True)
        ]

    def _read(self, context: JudgeContext, orders: Sequence[OrderedPair], counts: Counts) -> list[Game]:
        """Return the likeliest verdict on each ordered pair."""
        thoughts = self._thoughts(context, orders)
        tokens = VerdictTokens.of(context.reader(self.max_batch_tokens).tokenizer, self.key)
        read = self._next_logps(context, orders, thoughts, tokens.forks, tokens.alternatives)
        games: list[Game] = []
        for index, thought in enumerate(thoughts):
            if index in read:
                games.append(likeliest_verdict(tokens.shares(read[index]), written(thought)))
            else:
                failed = unasked(thought)
                games.append(Game(failed.status, None, failed.text))
        return games


def parse_game(text: str, finish_reason: FinishReason = FinishReason.EOS, shown: Sequence[str] = ()) -> Game:
    """Read one of the five verdicts from the judge's own lines of newly generated text.

    Two different verdicts are ambiguous, and so is a verdict after which another answer is chosen. A text without a
    verdict has a status that says why, for which `finish_reason` counts too.

    Args:
        text: what the judge wrote.
        finish_reason: why it ended.
        shown: the answers; their own words are no verdict.
    """
    found = read_bracketed(text, VERDICT, finish_reason, shown)
    if isinstance(found, JudgementStatus):
        return Game(found, None, text)
    said, behind = found
    verdicts = {SPELLINGS[one] for one in said}
    verdict = SPELLINGS[said[0]]
    letter = "C" if verdict is ArenaVerdict.TIE else verdict.value[0]
    if len(verdicts) > 1 or other_choices(behind, letter):
        return Game(JudgementStatus.AMBIGUOUS, None, text)
    return Game(JudgementStatus.OK, verdict, text)


def likeliest_verdict(shares: Sequence[float], thought: str = "") -> Game:
    """Return the likeliest of the five verdicts. Equally likely ones are a tie."""
    best = [verdict for verdict, share in zip(ArenaVerdict, shares, strict=True) if share == max(shares)]
    verdict = best[0] if len(best) == 1 else ArenaVerdict.TIE
    return Game(JudgementStatus.OK, verdict, f"{thought}{OPENING}{verdict}{CLOSING} with {max(shares):.3f}")
