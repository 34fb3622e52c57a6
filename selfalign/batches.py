"""Records to packed token batches: one row, no padding, a pair's prompt computed once and seen by both responses.

A *group* is a prompt and its responses (one for SFT, two for a pair). Groups lie one behind the other in a single
row; within a group the positions of every response continue from the end of the prompt, and a response attends to
its prompt and itself only. Architectures whose attention cannot be told so are given padded rows instead.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from selfalign.attention import Layout, is_packing
from selfalign.errors import SelfalignError
from selfalign.refinement import augment
from selfalign.tokenization import encode_prompt, encode_response

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from selfalign.records import PreferencePair, Prompt
    from selfalign.refinement import Refinement

S = TypeVar("S", bound=Sized)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Token ids of a prompt and of what follows it; `id` is the record's.

    The first `given[i]` tokens of response i are read but not scored: the rest of its own prompt, where several
    prompts share only their beginning. `reference` and `start` are the responses' summed log-probabilities (nats)
    under the reference policy and under M_t, where these were computed before.
    """

    id: str
    prompt: list[int]
    responses: list[list[int]]
    given: list[int]
    reference: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))

    def longest(self) -> int:
        """The longest sequence the model sees: the prompt with its longest response."""
        return len(self.prompt) + max(map(len, self.responses))

    def scored(self) -> list[int]:
        """How many tokens of each response are scored."""
        return [len(response) - given for response, given in zip(self.responses, self.given, strict=True)]


@dataclass(kw_only=True, slots=True)
class Batch:
    """What the scoring model is fed, and whose tokens the answers are.

    Attributes:
        inputs: keyword arguments of the model, tensors of shape (rows, tokens), and for packed rows the layout.
        predict_at: positions in the flattened inputs that predict a response token, shape (response tokens,).
        targets: the tokens predicted there.
        owner: which response each of them belongs to, counted over the batch's groups in order.
        tokens: how many tokens each response has, float, shape (responses,).
    """

    inputs: dict[str, Any]
    predict_at: Tensor
    targets: Tensor
    owner: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        move = {name: value.to(device) for name, value in self.inputs.items()}
        return Batch(
            inputs=move,
            predict_at=self.predict_at.to(device),
            targets=self.targets.to(device),
            owner=self.owner.to(device),
            tokens=self.tokens.to(device),
        )

    def sum_by_response(self, logps: Tensor) -> Tensor:
        """Adds each response's token values up: (response tokens,) → (responses,)."""
        return torch.zeros_like(self.tokens).index_add(0, self.owner, logps)


def encode_group(
    tokenizer: "Tokenizer", record_id: str, prompt: "Prompt", responses: Sequence[tuple[str, bool]]
) -> Group:
    """Tokenises a prompt and its responses, each given as (text, finished).

    Raises:
        SelfalignError: the prompt has no token that could predict a response's first one.
    """
    ids = [encode_response(tokenizer, text, finished=finished) for text, finished in responses]
    prompt_ids = encode_prompt(tokenizer, prompt)
    if not prompt_ids:
        raise SelfalignError(f"record {record_id}: the prompt is empty, and this tokenizer puts no BOS before it")
    return Group(id=record_id, prompt=prompt_ids, responses=ids, given=[0] * len(ids))


def share_prompt(record_id: str, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Group:
    """One group of several prompts, each with its response; what the prompts begin with in common is computed once."""
    columns = zip(*prompts, strict=False)
    shared = next((at for at, column in enumerate(columns) if len(set(column)) > 1), min(map(len, prompts)))
    tails = [[*prompt[shared:], *response] for prompt, response in zip(prompts, responses, strict=True)]
    given = [len(prompt) - shared for prompt in prompts]
    return Group(id=record_id, prompt=prompts[0][:shared], responses=tails, given=given)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairExample:
    """A preference pair as tokens: its responses behind x and, where the loss refines, behind p⊕x.

    `score_gap` is the judge's mean score of the chosen response minus that of the rejected one, where it is known.
    """

    plain: Group
    augmented: Group | None = None
    score_gap: float | None = None

    @property
    def id(self) -> str:
        """The pair's id."""
        return self.plain.id

    def __len__(self) -> int:
        return len(self.plain) + (len(self.augmented) if self.augmented else 0)

    def longest(self) -> int:
        """The longest sequence of either pass."""
        return max(self.plain.longest(), self.augmented.longest() if self.augmented else 0)


def encode_pairs(
    tokenizer: "Tokenizer",
    pairs: Iterable["PreferencePair"],
    refinement: "Refinement | None",
    limit: int,
    tally: Counter[str],
) -> Iterator[PairExample]:
    """Tokenises pairs one by one, chosen response first, in at most `limit` tokens a sequence.

    Where a sequence is longer, x loses its beginning, the same in both passes; responses are never cut.

    Args:
        tokenizer: the policy's.
        pairs: in any number.
        refinement: p, or None where there is no second pass.
        limit: the longest prompt with response, in tokens.
        tally: counts `pairs`, how many of them are `cut`, and how many are left out, a response alone being `too_long`.

    Raises:
        SelfalignError: behind the last pair, none fitted.
    """
    p = refinement.text(tokenizer) if refinement else None

    def encode(pair: "PreferencePair", prompt: "Prompt") -> PairExample:
        responses = [(pair.chosen, pair.chosen_finished), (pair.rejected, pair.rejected_finished)]
        plain = encode_group(tokenizer, pair.id, prompt, responses)
        augmented = None if p is None else encode_group(tokenizer, pair.id, augment(p, prompt), responses)
        gap = None
        if pair.chosen_score is not None and pair.rejected_score is not None:
            gap = pair.chosen_score - pair.rejected_score
        return PairExample(plain=plain, augmented=augmented, score_gap=gap)

    for pair in pairs:
        example = encode(pair, pair.prompt)
        if example.longest() > limit:
            shorter = shorten_prompt(tokenizer, pair.prompt, lambda x, pair=pair: encode(pair, x).longest() <= limit)
            if shorter is None:
                tally["too_long"] += 1
                continue
            example = encode(pair, shorter)
            tally["cut"] += 1
        tally["pairs"] += 1
        yield example
    if not tally["pairs"]:
        raise SelfalignError(f"none of {tally['too_long']} pairs fits into train.align.max_length={limit} tokens")


def shorten_prompt(tokenizer: "Tokenizer", prompt: "Prompt", fits: Callable[["Prompt"], bool]) -> "Prompt | None":
    """The prompt without as much of its beginning as is needed to fit; None where even its last token does not.

    Of a conversation the oldest turns go first (a system message stays), then the beginning of the last turn.
    """
    while not isinstance(prompt, str):
        system = [message for message in prompt[:1] if message["role"] == "system"]
        later = prompt[len(system) + 1 :]
        start = next((index for index, message in enumerate(later) if message["role"] == "user"), None)
        if start is None:
            break
        prompt = [*system, *later[start:]]
        if fits(prompt):
            return prompt
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    ids = encode_response(tokenizer, text, finished=False)

    def without(count: int) -> "Prompt":
        rest = str(tokenizer.decode(ids[count:])).lstrip("\ufffd")
        return rest if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": rest}]

    # The fewest tokens to leave out, by bisection: fewer never fit, more always do.
    counts = range(1, len(ids))
    count = bisect_left(counts, True, key=lambda count: fits(without(count)))
    return without(counts[count]) if count < len(counts) else None


def split_by_tokens(groups: Iterable[S], budget: int) -> Iterator[list[S]]:
    """Cuts groups, in their order, into runs of at most `budget` tokens (a longer group stands alone)."""
    run: list[S] = []
    room = budget
    for group in groups:
        if run and len(group) > room:
            yield run
            run, room = [], budget
        run.append(group)
        room -= len(group)
    if run:
        yield run


def make_batch(model: "PreTrainedModel", groups: Sequence[Group]) -> Batch:
    """The groups as the model wants them: packed after `enable_packing`, else padded."""
    return pack(groups) if is_packing(model) else pad(groups)


def pack(groups: Sequence[Group]) -> Batch:
    """One row: prompt, responses, next prompt, …; positions restart with each group."""
    ids: list[int] = []
    positions: list[int] = []
    predict_at: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    for group in groups:
        prompt_end = len(ids) + len(group.prompt) - 1
        ids += group.prompt
        positions += range(len(group.prompt))
        for response, given in zip(group.responses, group.given, strict=True):
            predict_at += [prompt_end, *range(len(ids), len(ids) + len(response) - 1)][given:]
            positions += range(len(group.prompt), len(group.prompt) + len(response))
            ids += response
            targets += response[given:]
            counts.append(len(response) - given)
    layout = Layout([(len(group.prompt), [len(response) for response in group.responses]) for group in groups])
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions]), "layout": layout}
    return _batch(inputs, predict_at, targets, counts)


def pad(groups: Sequence[Group]) -> Batch:
    """A row for each response with its own copy of the prompt, padded on the right."""
    rows = [[*group.prompt, *response] for group in groups for response in group.responses]
    prompts = [len(group.prompt) + given for group in groups for given in group.given]
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
    predict_at = [
        index * width + at
        for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
        for at in range(prompt - 1, len(row) - 1)
    ]
    targets = [token for row, prompt in zip(rows, prompts, strict=True) for token in row[prompt:]]
    return _batch(inputs, predict_at, targets, [len(row) - n for row, n in zip(rows, prompts, strict=True)])


def _batch(inputs: dict[str, Any], predict_at: list[int], targets: list[int], counts: list[int]) -> Batch:
    tokens = torch.tensor(counts)
    return Batch(
        inputs=inputs,
        predict_at=torch.tensor(predict_at),
        targets=torch.tensor(targets),
        owner=torch.repeat_interleave(torch.arange(len(counts)), tokens),
        tokens=tokens.float(),
    )
