"""Comparing two responses: by the probabilities of a policy, or by what a server writes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from selfalign.core.errors import SelfalignError
from selfalign.core.files import text_or_file
from selfalign.core.placeholders import check_template, fill
from selfalign.core.records import Comparison, FinishReason, JudgementStatus, Prompt, Response, Verdict
from selfalign.data.thinking import answer_given
from selfalign.data.turns import as_prompt
from selfalign.engines.openai_client import Endpoint
from selfalign.engines.protocol import score_batched
from selfalign.engines.replies import Reply
from selfalign.judges.comparisons import (
    OrderedPair,
    PairVerdict,
    ResponsePair,
    bias_statistics,
    compare_in_both_orders,
    parse_verdict,
    unread_text,
)
from selfalign.judges.expected import distribution, tokens_behind
from selfalign.judges.protocol import JudgeContext, check_max_batch_tokens, check_model, check_share
from selfalign.judges.sampled import write_thoughts
from selfalign.judges.unread import Unread
from selfalign.judges.written import JudgeText
from selfalign.metrics import catalog
from selfalign.metrics.summaries import win_statistics
from selfalign.models.batches import SharedPrompt, share_prompt
from selfalign.models.tokenizer import encode_prompt
from selfalign.store.artifacts import Counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

OPENING = "[["
"""Beginning of every answer; the verdict is the next token."""


@dataclass(kw_only=True, slots=True)
class ComparatorSettings:
    """Settings of judges that are shown two responses to one instruction, in both orders.

    Attributes:
        prompt: the question, a text or "file:PATH", with {instruction}, {first} and {second} where they belong.
        model: who judges: "self" (M_t), "sft" (M1), "base" (M0), or another model: a folder or hub id.
        endpoint: a server that judges instead of `model`, if it has a base_url.
        verdict_tokens: the most tokens that the server writes.
        thought_tokens: the most tokens of a thought: of the server's beside its verdict, or of a greedy one that a
            policy with markers of thoughts writes before it; 0 reads a policy's verdict behind an empty thought.
        max_batch_tokens: the most tokens of a forward pass.
        max_failure_rate: the run stops when more than this share of the comparisons has no verdict.
    """

    prompt: str
    model: str = "self"
    endpoint: Endpoint = field(default_factory=Endpoint)
    verdict_tokens: int = 512
    thought_tokens: int = field(default=0, metadata={"keyed": "if set"})
    max_batch_tokens: int = 2048
    max_failure_rate: float = 0.5
    key: ClassVar[str] = "judge"
    forms: ClassVar[tuple[str, ...]] = ("[[A]]", "[[B]]")
    """Verdicts that the prompt has to ask for."""

    def __post_init__(self) -> None:
        self.prompt = text_or_file(self.prompt, f"{self.key}.prompt")
        check_template(self.prompt, f"{self.key}.prompt", ("instruction", "first", "second"))
        check_model(self.model, self.key)
        check_share(self.max_failure_rate, self.key)
        check_max_batch_tokens(self.max_batch_tokens, self.key)
        if self.endpoint != Endpoint():
            self.endpoint.check(f"{self.key}.endpoint")
        if self.verdict_tokens < 1:
            raise SelfalignError(f"{self.key}.verdict_tokens must be 1 or more, got {self.verdict_tokens}")
        if self.thought_tokens < 0:
            raise SelfalignError(f"{self.key}.thought_tokens must be 0 or more, got {self.thought_tokens}")

    def check_tokenizer(self, tokenizer: "Tokenizer") -> None:
        """Check that each verdict is a single token."""
        verdict_tokens(tokenizer, self.key)

    def ask(self, instruction: str, first: str, second: str) -> Prompt:
        """Return the judge's prompt about two responses in this order, of which the judge sees the answers alone."""
        shown = {"first": answer_given(first), "second": answer_given(second)}
        return as_prompt(fill(self.prompt, {"instruction": instruction, **shown}))

    def check_failures(self, unread: Unread, compared: int, label: str) -> None:
        """Check that enough comparisons have a verdict.

        Args:
            unread: the comparisons without one.
            compared: the number of all comparisons.
            label: name of the comparison in messages.

        Raises:
            SelfalignError: too many have none, or all.
        """
        failed = unread.reasons
        if failed.total() > self.max_failure_rate * compared or failed.total() == compared:
            raise SelfalignError(
                f"{label}: {failed.total()} of {compared} comparisons have no verdict ({dict(failed)}); "
                f"{unread.describe(self.token_setting)}Choose another judge in {self.key}, or raise "
                f"{self.key}.max_failure_rate"
            )

    @property
    def token_setting(self) -> str:
        """The setting that limits the length of what the judge writes."""
        return f"{self.key}.verdict_tokens" if self.endpoint.base_url else f"{self.key}.thought_tokens"

    def name(self, context: JudgeContext) -> str:
        """Return the name of the judge in records."""
        return self.endpoint.name if self.endpoint.base_url else context.judging_policy().digest

    def probe(self) -> dict[str, Any]:
        """Return a request like any other, about two words."""
        return self._request("Greet me.", "Hello.", "Hi.")

    def _request(self, instruction: str, first: str, second: str) -> dict[str, Any]:
        asked = self.ask(instruction, first, second)
        return {"messages": asked, "temperature": 0, "max_tokens": self.verdict_tokens + self.thought_tokens}

    def _replies(self, context: JudgeContext, orders: Sequence[OrderedPair], counts: Counts) -> list[Reply]:
        """Return what a server writes about each ordered pair."""
        requests = {
            f"{ordered.pair.id}{'-swapped' * ordered.swapped}": self._request(
                ordered.pair.instruction.text, *ordered.texts
            )
            for ordered in orders
        }
        client = context.client(self.endpoint, f"{self.key}.endpoint")
        replies = list(client.complete_all(requests, context.journal, 1).values())
        counts |= self.endpoint.usage(replies)
        return replies

    def _thoughts(self, context: JudgeContext, orders: Sequence[OrderedPair]) -> list[JudgeText | None]:
        """Return the thought that a policy writes about each ordered pair; an empty one without a budget."""
        if not (self.thought_tokens and orders):
            return [JudgeText("", FinishReason.EOS)] * len(orders)
        asked = [self.ask(ordered.pair.instruction.text, *ordered.texts) for ordered in orders]
        return write_thoughts(context, asked, self.thought_tokens, orders[0].pair.id)

    def _next_logps(
        self,
        context: JudgeContext,
        orders: Sequence[OrderedPair],
        thoughts: Sequence[JudgeText | None],
        beginnings: Sequence[list[int]],
        tokens: Sequence[int],
    ) -> dict[int, list[list[float]]]:
        """Return log p of the tokens behind `[[` and each beginning of a verdict, for each ordered pair that can be
        asked.

        The prompts of one instruction share their beginning, which is computed once.

        Args:
            context: the context of the judge.
            orders: the ordered pairs.
            thoughts: the judge's thought about each.
            beginnings: tokens of a verdict that are given; an empty list for its first token.
            tokens: the next tokens to read.

        Returns:
            {index of the ordered pair: a row for each beginning}. Pairs whose prompt is too long, or whose thought has
            no end, are missing.
        """
        reader = context.reader(self.max_batch_tokens)
        room = reader.context - max(map(len, beginnings))
        prompts: dict[str, dict[tuple[int, int], list[int]]] = {}
        for index, (ordered, thought) in enumerate(zip(orders, thoughts, strict=True)):
            if thought is None or thought.still_thinking:
                continue
            asked = self.ask(ordered.pair.instruction.text, *ordered.texts)
            ids = encode_prompt(reader.tokenizer, asked, OPENING, thought.thought)
            if len(ids) < room:
                own = prompts.setdefault(ordered.pair.instruction.id, {})
                own |= {(index, at): [*ids, *beginning] for at, beginning in enumerate(beginnings)}
        groups: list[SharedPrompt] = [share_prompt(n, list(p.values()), [[] for _ in p]) for n, p in prompts.items()]
        read: dict[int, list[list[float]]] = {}
        for group, rows in zip(groups, score_batched(reader, groups, tokens, context.journal, "verdicts"), strict=True):
            for (index, _), row in zip(prompts[group.id], rows, strict=True):
                read.setdefault(index, []).append(row)
        return read


@dataclass(kw_only=True, slots=True)
class PairwiseComparator(ComparatorSettings):
    """Compare two responses to one instruction in both orders.

    The verdict is the likeliest of the tokens A, B and C (a tie) behind `[[`, in one forward pass for each order. So
    even a small model gives a verdict, and nothing has to be parsed or sampled. If the two orders disagree, the
    comparison is a tie, as in the head-to-head evaluation of arXiv 2401.10020.
    An endpoint gives no probabilities: it writes greedily, and `[[A]]`, `[[B]]` or `[[C]]` is read from its text.

    Attributes:
        debias_position: subtracts the judge's preference for the first position, estimated from other comparisons
            (`position_bias_nats`). Without it a small model, which mostly prefers one position, gives ties.
    """

    debias_position: bool = False

    def compare(self, context: JudgeContext, pairs: Sequence[ResponsePair]) -> tuple[list[Comparison], Counts]:
        """Compare each pair of responses in both orders. Return the comparisons and the judge's counts."""
        counts: Counts = {}
        read = self._ask if self.endpoint.base_url else self._read
        return compare_in_both_orders(pairs, lambda orders: read(context, orders, counts), self.name(context)), counts

    def compare_models(
        self, context: JudgeContext, pairs: Sequence[ResponsePair], label: str
    ) -> tuple[list[Comparison], Counts]:
        """Compare the responses of one model with those of another, and count who wins.

        Args:
            context: the context of the judge.
            pairs: one pair for each instruction; the first response is always the same model's.
            label: name of the comparison in messages.

        Returns:
            The comparisons; and how often the first model won, lengths, the judge's bias, and drops by reason.

        Raises:
            SelfalignError: too many comparisons have no verdict.
        """
        comparisons, counts = self.compare(context, pairs)
        unread = Unread()
        unread.add((one.status, unread_text(one)) for one in comparisons if one.outcome is None)
        self.check_failures(unread, len(pairs), label)
        longer = [float(len(pair.first.text) - len(pair.second.text)) for pair in pairs]
        known = [(c.outcome, length) for c, length in zip(comparisons, longer, strict=True) if c.outcome is not None]
        return comparisons, {
            catalog.COMPARISONS.name: len(pairs),
            "dropped": dict(sorted(unread.reasons.items())),
            **win_statistics([outcome for outcome, _ in known], [length for _, length in known]),
            catalog.MEAN_CHARACTERS.name: mean_length([pair.first for pair in pairs]),
            catalog.MEAN_CHARACTERS_OPPONENT.name: mean_length([pair.second for pair in pairs]),
            **bias_statistics(comparisons),
            **counts,
        }

    def _read(self, context: JudgeContext, orders: Sequence[OrderedPair], counts: Counts) -> list[PairVerdict]:
        """Return the likeliest verdict on each ordered pair."""
        thoughts = self._thoughts(context, orders)
        tokens = verdict_tokens(context.reader(self.max_batch_tokens).tokenizer, self.key)
        rows = self._next_logps(context, orders, thoughts, [[]], tokens)
        read = {index: row for index, [row] in rows.items()}
        preferences = position_bias_nats(orders, read)
        counts[catalog.JUDGE_PLACE_PREFERENCE.name] = math.fsum(preferences) / max(1, len(preferences))
        taken_off = preferences if self.debias_position else [0.0] * len(preferences)
        return [
            likeliest(read[index], taken_off[index // 2], written(thought)) if index in read else unasked(thought)
            for index, thought in enumerate(thoughts)
        ]

    def _ask(self, context: JudgeContext, orders: Sequence[OrderedPair], counts: Counts) -> list[PairVerdict]:
        """Return the verdicts that a server writes."""
        return [
            parse_verdict(reply.text, reply.finish_reason, ordered.texts)
            for reply, ordered in zip(self._replies(context, orders, counts), orders, strict=True)
        ]


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


def position_bias_nats(orders: Sequence[OrderedPair], logps: Mapping[int, Sequence[float]]) -> list[float]:
    """Return how much the judge prefers the first position, in nats, for each pair of responses.

    The mean of log p(A) - log p(B) over both orders of a pair is that preference: what the responses differ in cancels
    out. A pair is not corrected by its own preference, which would leave its orders nothing to disagree about, but by
    the mean over the other pairs of its instruction. Where there are none, the mean over all instructions is taken.

    Args:
        orders: both orders of each pair, one after the other.
        logps: log p of A, B and a tie, by the index in `orders`; a pair without both is left out of the means.
    """
    gaps = {index: logps[index][0] - logps[index][1] for index in logps}
    pairs = range(len(orders) // 2)
    own = {pair: (gaps[2 * pair] + gaps[2 * pair + 1]) / 2 for pair in pairs if {2 * pair, 2 * pair + 1} <= gaps.keys()}
    pairs_of: dict[str, set[int]] = {}
    for pair in own:
        pairs_of.setdefault(orders[2 * pair].pair.instruction.id, set()).add(pair)
    preferences: list[float] = []
    for pair in pairs:
        others = pairs_of.get(orders[2 * pair].pair.instruction.id, set()) - {pair} or own.keys() - {pair}
        preferences.append(math.fsum(own[other] for other in others) / max(1, len(others)))
    return preferences


def written(thought: JudgeText | None) -> str:
    """Return what a judge wrote before its verdict."""
    return thought.thought + thought.text if thought else ""


def unasked(thought: JudgeText | None) -> PairVerdict:
    """Return the verdict of a judge that could not be asked, for length, or was still thinking at its last token."""
    thinks = thought is not None and thought.still_thinking
    status = JudgementStatus.TRUNCATED if thinks else JudgementStatus.PROMPT_TOO_LONG
    return PairVerdict(status, None, written(thought))


def likeliest(logps: Sequence[float], preference: float = 0.0, thought: str = "") -> PairVerdict:
    """Return the likeliest verdict after taking a preference (nats) for A over B off. Equal verdicts are a tie."""
    a, b, tie = logps
    shares = distribution([a - preference / 2, b + preference / 2, tie])
    best = [verdict for verdict, share in zip(Verdict, shares, strict=True) if share == max(shares)]
    verdict = best[0] if len(best) == 1 else Verdict.TIE
    return PairVerdict(JudgementStatus.OK, verdict, f"{thought}{OPENING}{verdict}]] with {max(shares):.3f}")
