"""Comparing two responses: by the probabilities of a policy, or by what a server writes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.files import text_or_file
from selfalign.core.placeholders import check_template, fill
from selfalign.core.records import Comparison, JudgementStatus, Prompt, Response, Verdict
from selfalign.data.sources import as_prompt
from selfalign.engines.openai_client import Endpoint
from selfalign.engines.protocol import read_all
from selfalign.judges.comparisons import Duel, Reading, Showing, bias_statistics, compare, parse_verdict, unread_text
from selfalign.judges.expected import distribution, tokens_behind
from selfalign.judges.protocol import Bench, check_batch_tokens, check_model, check_share
from selfalign.judges.unread import Unread
from selfalign.metrics import catalog
from selfalign.metrics.summaries import win_statistics
from selfalign.models.batches import Group, share_prompt
from selfalign.models.tokenizer import encode_prompt
from selfalign.store.artifacts import Counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

OPENING = "[["
"""Beginning of every answer; the verdict is the next token."""


@dataclass(kw_only=True, slots=True)
class Referee:
    """Compare two responses to one instruction in both orders.

    The verdict is the likeliest of the tokens A, B and C (a tie) behind `[[`, in one forward pass for each order. So
    even a small model gives a verdict, and nothing has to be parsed or sampled. If the two orders disagree, the
    comparison is a tie, as in the head-to-head evaluation of arXiv 2401.10020.
    An endpoint gives no probabilities: it writes greedily, and `[[A]]`, `[[B]]` or `[[C]]` is read from its text.

    Attributes:
        prompt: the question, a text or "file:PATH", with {instruction}, {first} and {second} where they belong.
        model: who judges: "self" (M_t), "sft" (M1), "base" (M0), or another model: a folder or hub id.
        endpoint: a server that judges instead of `model`, if it has a base_url.
        verdict_tokens: the most tokens that the server writes.
        place_correction: subtracts the judge's preference for the first position, estimated from other comparisons
            (`place_preferences`). Without it a small model, which mostly prefers one position, gives ties.
        batch_tokens: the most tokens of a forward pass.
        max_failed_share: the run stops when more than this share of the comparisons has no verdict.
    """

    prompt: str
    model: str = "self"
    endpoint: Endpoint = field(default_factory=Endpoint)
    verdict_tokens: int = 512
    place_correction: bool = False
    batch_tokens: int = 2048
    max_failed_share: float = 0.5
    key: ClassVar[str] = "judge"

    def __post_init__(self) -> None:
        self.prompt = text_or_file(self.prompt, f"{self.key}.prompt")
        check_template(self.prompt, f"{self.key}.prompt", ("instruction", "first", "second"))
        check_model(self.model, self.key)
        check_share(self.max_failed_share, self.key)
        check_batch_tokens(self.batch_tokens, self.key)
        if self.endpoint != Endpoint():
            self.endpoint.check(f"{self.key}.endpoint")
        if self.verdict_tokens < 1:
            raise SelfalignError(f"{self.key}.verdict_tokens must be 1 or more, got {self.verdict_tokens}")

    def ask(self, instruction: str, first: str, second: str) -> Prompt:
        """Return the judge's prompt about two responses in this order."""
        return as_prompt(fill(self.prompt, {"instruction": instruction, "first": first, "second": second}))

    def compare(self, bench: Bench, duels: Sequence[Duel]) -> tuple[list[Comparison], Counts]:
        """Compare each pair of responses in both orders. Return the comparisons and the judge's counts."""
        counts: Counts = {}
        read = self._ask if self.endpoint.base_url else self._read
        return compare(duels, lambda showings: read(bench, showings, counts), self.name(bench)), counts

    def decide(self, bench: Bench, duels: Sequence[Duel], label: str) -> tuple[list[Comparison], Counts]:
        """Compare the responses of one model with those of another, and count who wins.

        Args:
            bench: the context of the judge.
            duels: one pair for each instruction; the first response is always the same model's.
            label: name of the comparison in messages.

        Returns:
            The comparisons; and how often the first model won, lengths, the judge's bias, and drops by reason.

        Raises:
            SelfalignError: too many comparisons have no verdict.
        """
        comparisons, counts = self.compare(bench, duels)
        unread = Unread()
        unread.add((one.status, unread_text(one)) for one in comparisons if one.outcome is None)
        failed = unread.reasons
        if failed.total() > self.max_failed_share * len(duels) or failed.total() == len(duels):
            raise SelfalignError(
                f"{label}: {failed.total()} of {len(duels)} comparisons have no verdict ({dict(failed)}); "
                f"{unread.describe(self.token_setting)}Choose another judge in {self.key}, or raise "
                f"{self.key}.max_failed_share"
            )
        longer = [float(len(duel.first.text) - len(duel.second.text)) for duel in duels]
        known = [(c.outcome, length) for c, length in zip(comparisons, longer, strict=True) if c.outcome is not None]
        return comparisons, {
            catalog.COMPARISONS.name: len(duels),
            "dropped": dict(sorted(failed.items())),
            **win_statistics([outcome for outcome, _ in known], [length for _, length in known]),
            catalog.MEAN_CHARACTERS.name: mean_length([duel.first for duel in duels]),
            catalog.MEAN_CHARACTERS_OPPONENT.name: mean_length([duel.second for duel in duels]),
            **bias_statistics(comparisons),
            **counts,
        }

    @property
    def token_setting(self) -> str:
        """The setting that limits the length of a server's verdict."""
        return f"{self.key}.verdict_tokens"

    def name(self, bench: Bench) -> str:
        """Return the name of the judge in records."""
        return self.endpoint.name if self.endpoint.base_url else bench.judging_policy().digest

    def _read(self, bench: Bench, showings: Sequence[Showing], counts: Counts) -> list[Reading]:
        """Return the likeliest verdict on each ordered pair. Those of one instruction share their beginning."""
        reader = bench.reader(self.batch_tokens)
        tokens = verdict_tokens(reader.tokenizer, self.key)
        prompts: dict[str, dict[int, list[int]]] = {}
        for index, showing in enumerate(showings):
            asked = self.ask(showing.duel.instruction.text, *showing.texts)
            ids = encode_prompt(reader.tokenizer, asked, OPENING)
            if len(ids) < reader.context:
                prompts.setdefault(showing.duel.instruction.id, {})[index] = ids
        groups: list[Group] = [share_prompt(n, list(p.values()), [[] for _ in p]) for n, p in prompts.items()]
        read: dict[int, list[float]] = {}
        for group, rows in zip(groups, read_all(reader, groups, tokens, bench.journal, "verdicts"), strict=True):
            read |= dict(zip(prompts[group.id], rows, strict=True))
        preferences = place_preferences(showings, read)
        counts[catalog.JUDGE_PLACE_PREFERENCE.name] = math.fsum(preferences) / max(1, len(preferences))
        refused = Reading(JudgementStatus.PROMPT_TOO_LONG, None, "")
        taken_off = preferences if self.place_correction else [0.0] * len(preferences)
        return [
            likeliest(read[index], taken_off[index // 2]) if index in read else refused
            for index in range(len(showings))
        ]

    def _ask(self, bench: Bench, showings: Sequence[Showing], counts: Counts) -> list[Reading]:
        """Return the verdicts that a server writes."""
        requests = {
            f"{showing.duel.id}{'-swapped' * showing.swapped}": self._request(
                showing.duel.instruction.text, *showing.texts
            )
            for showing in showings
        }
        client = bench.client(self.endpoint, f"{self.key}.endpoint")
        replies = list(client.complete_all(requests, bench.journal, 1).values())
        counts |= self.endpoint.usage(replies)
        return [
            parse_verdict(reply.text, reply.finish_reason, showing.texts)
            for reply, showing in zip(replies, showings, strict=True)
        ]

    def probe(self) -> dict[str, Any]:
        """Return a request like any other, about two words."""
        return self._request("Greet me.", "Hello.", "Hi.")

    def _request(self, instruction: str, first: str, second: str) -> dict[str, Any]:
        asked = self.ask(instruction, first, second)
        return {"messages": asked, "temperature": 0, "max_tokens": self.verdict_tokens}


def verdict_tokens(tokenizer: "Tokenizer", key: str) -> list[int]:
    """Return the token of each verdict behind `[[`.

    Raises:
        SelfalignError: the tokenizer encodes a verdict as several tokens; the message names `key`.model.
    """
    tokens = tokens_behind(tokenizer, OPENING, list(Verdict))
    if tokens is None:
        raise SelfalignError(
            f"{key}.model: its tokenizer encodes A, B or C as several tokens. Choose another judge model."
        )
    return tokens


def mean_length(responses: Sequence[Response]) -> float:
    """Return the mean length in characters."""
    return sum(len(response.text) for response in responses) / len(responses)


def place_preferences(showings: Sequence[Showing], logps: Mapping[int, Sequence[float]]) -> list[float]:
    """Return how much the judge prefers the first position, in nats, for each pair of responses.

    The mean of log p(A) - log p(B) over both orders of a pair is that preference: what the responses differ in cancels
    out. A pair is not corrected by its own preference, which would leave its orders nothing to disagree about, but by
    the mean over the other pairs of its instruction. Where there are none, the mean over all instructions is taken.

    Args:
        showings: both orders of each pair, one after the other.
        logps: log p of A, B and a tie, by the index in `showings`; a pair without both is left out of the means.
    """
    gaps = {index: logps[index][0] - logps[index][1] for index in logps}
    duels = range(len(showings) // 2)
    own = {duel: (gaps[2 * duel] + gaps[2 * duel + 1]) / 2 for duel in duels if {2 * duel, 2 * duel + 1} <= gaps.keys()}
    families: dict[str, set[int]] = {}
    for duel in own:
        families.setdefault(showings[2 * duel].duel.instruction.id, set()).add(duel)
    preferences: list[float] = []
    for duel in duels:
        others = families.get(showings[2 * duel].duel.instruction.id, set()) - {duel} or own.keys() - {duel}
        preferences.append(math.fsum(own[other] for other in others) / max(1, len(others)))
    return preferences


def likeliest(logps: Sequence[float], preference: float = 0.0) -> Reading:
    """Return the likeliest verdict after taking a preference (nats) for A over B off. Equal verdicts are a tie."""
    a, b, tie = logps
    shares = distribution([a - preference / 2, b + preference / 2, tie])
    best = [verdict for verdict, share in zip(Verdict, shares, strict=True) if share == max(shares)]
    verdict = best[0] if len(best) == 1 else Verdict.TIE
    return Reading(JudgementStatus.OK, verdict, f"{OPENING}{verdict}]] with {max(shares):.3f}")
