"""Records to packed token batches: one row without padding, in which every distinct prefix is computed once.

A *group* is a prompt and its responses (one for SFT, two for a pair). A batch is the tree of all prompts with their
responses: a pair's prompt stands once, and so does the rubric of all judgements or the p before several x. A token
attends to those before it in its own text only. Architectures whose attention cannot be told so are given padded rows
instead.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from msgspec import UnsetType
from torch import Tensor

from selfalign.core.errors import SelfalignError
from selfalign.core.records import PreferencePair, Prompt, Response
from selfalign.data.tails import tails_of
from selfalign.data.thinking import ask_to_think
from selfalign.losses.refinement import Augmentation, Refinement, augment
from selfalign.models.checkpoint import UNBOUNDED
from selfalign.models.packed_attention import PackedLayout, is_packing
from selfalign.models.prefix_tree import DistinctTokens, PrefixTree, common_prefix
from selfalign.models.prompt_states import PromptStates, shares_prompt_states
from selfalign.models.tokenizer import (
    Answer,
    count_thought,
    decode_behind,
    decode_response,
    encode_answers,
    encode_prompt,
    encode_tail,
    plain_ids,
    settle_boundary,
    text_faults,
    under_system,
    warn_of_faults,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Texts(Protocol):
    """Tokens of one or several texts. Its length is the number of them, with shared prompts counted once."""

    def __len__(self) -> int: ...

    def sequences(self) -> list[list[int]]: ...


S = TypeVar("S", bound=Texts)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPrompt:
    """Token ids of a prompt and of what follows it; `id` is the record's.

    The first `num_context_tokens[i]` tokens of response i are read but not scored: the rest of its own prompt, where
    several prompts share only their beginning, or a thought that is masked. So are the tokens from `start` to before
    `end` for each [start, end] in `unscored[i]`, as the user's turns between answers. `unscored` is empty if no
    response has such tokens.
    """

    id: str
    prompt: list[int]
    responses: list[list[int]]
    num_context_tokens: list[int]
    unscored: list[list[list[int]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))

    def sequences(self) -> list[list[int]]:
        """The prompt with each of its responses."""
        return [[*self.prompt, *response] for response in self.responses]

    def longest(self) -> int:
        """The longest sequence the model sees: the prompt with its longest response."""
        return len(self.prompt) + max(map(len, self.responses))

    def scored(self) -> list[int]:
        """The number of scored tokens of each response."""
        passed = [sum(end - start for start, end in spans) for spans in self.unscored] or [0] * len(self.responses)
        counts = zip(self.responses, self.num_context_tokens, passed, strict=True)
        return [len(response) - given - between for response, given, between in counts]

    def scored_places(self, index: int) -> Sequence[int]:
        """The indices of the scored tokens in response `index`."""
        places = range(self.num_context_tokens[index], len(self.responses[index]))
        if not self.unscored:
            return places
        passed = {at for start, end in self.unscored[index] for at in range(start, end)}
        return [at for at in places if at not in passed]


@dataclass(kw_only=True, slots=True)
class Batch:
    """Inputs of the scoring model, and the response that each target token belongs to.

    Attributes:
        inputs: keyword arguments of the model, tensors of shape (rows, tokens), and the layout of rows with groups.
        logit_positions: positions in the flattened inputs that predict a target, shape (targets,).
        targets: the tokens predicted there, shape (targets,).
        occurrences: which target each token of the responses is, in their order, shape (response tokens,).
        owner: which response each of these belongs to, counted over the batch's groups in order.
        tokens: how many tokens each response has, float, shape (responses,).
    """

    inputs: dict[str, Any]
    logit_positions: Tensor
    targets: Tensor
    occurrences: Tensor
    owner: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on another device."""
        move = {name: value.to(device) for name, value in self.inputs.items()}
        return Batch(
            inputs=move,
            logit_positions=self.logit_positions.to(device),
            targets=self.targets.to(device),
            occurrences=self.occurrences.to(device),
            owner=self.owner.to(device),
            tokens=self.tokens.to(device),
        )

    def sum_by_response(self, logps: Tensor) -> Tensor:
        """Sum the targets' values by response: (targets,) → (responses,)."""
        return torch.zeros_like(self.tokens).index_add(0, self.owner, logps[self.occurrences])


def encode_group(
    tokenizer: "Tokenizer", record_id: str, prompt: "Prompt", answers: Sequence[Answer], *, mask_thought: bool = False
) -> SharedPrompt:
    """Tokenise a prompt and the responses behind it, whose thoughts are not scored if they are masked.

    Raises:
        SelfalignError: the prompt has no token that could predict a response's first one, or the chat template refuses
            it; the record is named.
    """
    with of_record(record_id):
        prompt_ids = encode_prompt(tokenizer, prompt)
        if not prompt_ids:
            raise SelfalignError("the prompt is empty, and the tokenizer adds no BOS: give a prompt")
        encoded = [_encode_response(tokenizer, prompt, prompt_ids, answer) for answer in answers]
    masked: list[int] = []
    unscored: list[list[list[int]]] = []
    for ids, turns in encoded:
        scored = [
            (
                start + (count_thought(tokenizer, [*prompt_ids, *ids[:start]], ids[start:end]) if mask_thought else 0),
                end,
            )
            for start, end in turns
        ]
        masked.append(scored[0][0])
        unscored.append([[before, start] for (_, before), (start, _) in pairwise(scored)])
    return SharedPrompt(
        id=record_id,
        prompt=prompt_ids,
        responses=[ids for ids, _ in encoded],
        num_context_tokens=masked,
        unscored=unscored if any(unscored) else [],
    )


def _encode_response(
    tokenizer: "Tokenizer", prompt: "Prompt", prompt_ids: list[int], answer: Answer
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a response behind its prompt, and the (start, end) of the assistant's turns in them."""
    if not answer.turns:
        [ids] = encode_answers(tokenizer, prompt, [answer])
        return ids, [(0, len(ids))]
    if isinstance(prompt, str):
        raise SelfalignError("a response of several turns needs a prompt of turns, but prompt is a text")
    return encode_tail(tokenizer, prompt, prompt_ids, answer)


@contextmanager
def of_record(record_id: str) -> Iterator[None]:
    """Name the record in errors raised inside the block."""
    try:
        yield
    except SelfalignError as error:
        raise SelfalignError(f"record {record_id}: {error}") from error


def share_prompt(
    record_id: str,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    unscored: Sequence[list[list[int]]] = (),
) -> SharedPrompt:
    """Return one group of several prompts, each with its response. Their common beginning is computed once.

    Args:
        record_id: names the group.
        prompts: the prompts.
        responses: the responses to them.
        unscored: [start, end] of tokens of each response that are read but not scored; empty if there are none.
    """
    shared = common_prefix(min(prompts), max(prompts))  # In sorted order, those between have it too.
    tails = [[*prompt[shared:], *response] for prompt, response in zip(prompts, responses, strict=True)]
    given = [len(prompt) - shared for prompt in prompts]
    moved = [
        [[start + more, end + more] for start, end in spans]
        for spans, more in zip(unscored, given, strict=bool(unscored))
    ]
    return SharedPrompt(
        id=record_id,
        prompt=prompts[0][:shared],
        responses=tails,
        num_context_tokens=given,
        unscored=moved if any(moved) else [],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PairExample:
    """A preference pair as tokens, with what is stored of it; or a labelled response beside another prompt's.

    Attributes:
        plain: its responses behind x. Of a labelled response, itself, and the response to another prompt from which z₀
            is estimated; whatever is said of the chosen and the rejected response goes for these two.
        augmented: the same behind p⊕x, where the loss refines.
        negative: the same behind p⁻⊕x, where it compares contrastive prompts.
        scores: the judge's mean scores of the chosen and of the rejected response; empty unless both are known.
        label_smoothing: ε of this pair, where it has its own.
        desirable: whether a labelled response is desirable; None for a pair.
        reference: log-probabilities of both responses given x under the reference policy, summed over tokens, in nats;
            empty where they are not stored, as the next two.
        augmented_reference: the same given p⊕x.
        start: log-probabilities given x under M_t.
    """

    plain: SharedPrompt
    augmented: SharedPrompt | None = None
    negative: SharedPrompt | None = None
    scores: list[float] = field(default_factory=list)
    label_smoothing: float | None = None
    desirable: bool | None = None
    reference: list[float] = field(default_factory=list)
    augmented_reference: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)

    @property
    def id(self) -> str:
        """The pair's id."""
        return self.plain.id

    @property
    def passes(self) -> list[SharedPrompt]:
        """Both responses behind x, and behind p⊕x and p⁻⊕x if there are such passes."""
        return [group for group in (self.plain, self.augmented, self.negative) if group is not None]

    def __len__(self) -> int:
        return sum(map(len, self.passes))

    def sequences(self) -> list[list[int]]:
        """The sequences of all passes."""
        return [sequence for group in self.passes for sequence in group.sequences()]

    def longest(self) -> int:
        """The longest sequence of all passes."""
        return max(group.longest() for group in self.passes)


def encode_pairs(
    tokenizer: "Tokenizer",
    pairs: Iterable["PreferencePair"],
    refinement: "Refinement | None",
    limit: int,
    tally: Counter[str],
    context: int = UNBOUNDED,
    *,
    mask_thought: bool = False,
) -> Iterator[PairExample]:
    """Yield pairs as tokens, chosen response first, in at most `limit` tokens of x and a response.

    If they are longer, x loses its beginning; responses are never cut. After p⊕x, and after p⁻⊕x where p is contrasted
    with p⁻, stand the same x and the same response: p comes on top of the limit, so that all losses train on the same
    data. Only if that exceeds the model's context, x loses more of its beginning there.

    Args:
        tokenizer: the policy's.
        pairs: in any number.
        refinement: p, or None where there is no second pass.
        limit: the longest x with a response, in tokens.
        tally: counts `pairs`, those with a `cut` prompt, those whose x is cut further behind p (`cut_behind_p`), those
            with the faults that `text_faults` names, and those dropped because a response alone is `too_long`.
        context: the longest sequence the model takes.
        mask_thought: whether thoughts are read without being scored.

    Raises:
        SelfalignError: no pair fits.
    """
    augmentations = [refinement.text(tokenizer), refinement.negative()] if refinement else []
    for pair in pairs:
        asked = under_system(tokenizer, ask_to_think(pair.thought_prompt, pair.prompt))
        prompt, answers = settle_boundary(tokenizer, asked, answers_of(pair))
        whole = encode_group(tokenizer, pair.id, prompt, answers, mask_thought=mask_thought)
        plain, prompt = shorten_group(tokenizer, whole, prompt, limit)
        if prompt is not None and plain is not whole:
            _check_tails(tokenizer, whole, prompt, answers)
        second: list[SharedPrompt | None] = []
        shortest = prompt
        for p in augmentations:
            group = None
            if p is not None and shortest is not None:
                group, shortest = _behind(tokenizer, whole, p, shortest, context, answers)
            second.append(group)
        if shortest != prompt and shortest is not None:
            tally["cut_behind_p"] += 1
        prompt = prompt if shortest is not None else None
        if plain is None or prompt is None:
            tally["too_long"] += 1
            continue
        if plain is not whole:
            tally["cut"] += 1
        tally["pairs"] += 1
        tally.update(text_faults(tokenizer, prompt, answers))
        augmented, negative = second or (None, None)
        yield PairExample(
            plain=plain,
            augmented=augmented,
            negative=negative,
            scores=scores_of(pair),
            label_smoothing=label_smoothing_of(pair),
        )
    warn_of_faults(tokenizer, tally, tally["pairs"], "pairs")
    if not tally["pairs"]:
        behind = f", and behind loss.refinement.prompt into the model's context of {context}" if refinement else ""
        raise SelfalignError(
            f"none of {tally['too_long']} pairs fits into train.align.max_length={limit} tokens{behind}"
        )


def _behind(
    tokenizer: "Tokenizer",
    group: SharedPrompt,
    p: Augmentation,
    prompt: "Prompt",
    context: int,
    answers: Sequence[Answer],
) -> "tuple[SharedPrompt | None, Prompt | None]":
    """Return the responses of a group behind p⊕x, and x, whose beginning is cut to fit; None if nothing fits."""
    with of_record(group.id):
        longer = replace(group, prompt=encode_prompt(tokenizer, augment(p, prompt)))
    augmented, behind_p = shorten_group(tokenizer, longer, prompt, context, lambda x: augment(p, x))
    if behind_p is not None:
        _check_tails(tokenizer, group, augment(p, behind_p), answers)
    return augmented, behind_p


def _check_tails(tokenizer: "Tokenizer", group: SharedPrompt, prompt: "Prompt", answers: Sequence[Answer]) -> None:
    """Check that responses of several turns have behind another prompt the ids that they have in the group.

    Raises:
        SelfalignError: the template writes them in another way there; the record is named.
    """
    if any(answer.turns or answer.calls for answer in answers):
        other = encode_group(tokenizer, group.id, prompt, answers)
        if other.responses != group.responses:
            raise SelfalignError(
                f"record {group.id}: behind a shortened or augmented prompt the chat template writes its responses in "
                "another way. Give shorter prompts, or another template with model.chat_template=FILE"
            )


def shorten_group(
    tokenizer: "Tokenizer",
    group: SharedPrompt,
    prompt: "Prompt",
    limit: int,
    ask: Callable[["Prompt"], "Prompt"] = lambda prompt: prompt,
) -> "tuple[SharedPrompt | None, Prompt | None]":
    """Return the group and its prompt, with the beginning of the prompt cut to fit; None if nothing fits.

    Args:
        tokenizer: counts the tokens.
        group: of the prompt.
        prompt: what may lose its beginning.
        limit: the longest sequence.
        ask: puts the prompt into what the group begins with.
    """
    if group.longest() <= limit:
        return group, prompt
    room = limit - max(map(len, group.responses))
    shorter = shorten_prompt(tokenizer, prompt, lambda x: len(encode_prompt(tokenizer, ask(x))) <= room)
    if shorter is None:
        return None, None
    return replace(group, prompt=encode_prompt(tokenizer, ask(shorter))), shorter


def answers_of(pair: "PreferencePair") -> list[Answer]:
    """Return both responses, the chosen one first."""
    chosen, rejected = tails_of(pair)
    return [
        Answer(
            text=pair.chosen,
            finished=pair.chosen_finished,
            ids=pair.chosen_ids,
            thought=pair.chosen_thought,
            calls=chosen.calls,
            turns=chosen.turns,
        ),
        Answer(
            text=pair.rejected,
            finished=pair.rejected_finished,
            ids=pair.rejected_ids,
            thought=pair.rejected_thought,
            calls=rejected.calls,
            turns=rejected.turns,
        ),
    ]


def answer_of(response: "Response") -> Answer:
    """Return a response as the text behind its prompt, its thought included."""
    return Answer(text=response.text, finished=response.finished, ids=response.ids, thought=response.thought)


def answer_read_by(tokenizer: "Tokenizer", response: "Response") -> Answer:
    """Return a response as a text behind its prompt, for a tokenizer that may be another than its writer's.

    It keeps the ids that it was written as where they say the same with this tokenizer.
    """
    answer = answer_of(response)
    same = decode_response(tokenizer, answer.ids) == answer.thought + answer.text
    return answer if same else replace(answer, ids=[])


def scores_of(pair: "PreferencePair") -> list[float]:
    """Return the scores of the chosen and of the rejected response; none unless both are known."""
    if pair.chosen_score is None or pair.rejected_score is None:
        return []
    return [pair.chosen_score, pair.rejected_score]


def label_smoothing_of(pair: "PreferencePair") -> float | None:
    """Return the pair's own ε, or None."""
    return None if isinstance(pair.label_smoothing, UnsetType) else pair.label_smoothing


def shorten_prompt(tokenizer: "Tokenizer", prompt: "Prompt", fits: Callable[["Prompt"], bool]) -> "Prompt | None":
    """Return the prompt without as much of its beginning as is needed to fit; None if even its last token does not.

    Of a conversation the oldest turns go first (a system message stays), then the beginning of the last user turn.
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
    last = 0 if isinstance(prompt, str) else max(at for at, turn in enumerate(prompt) if turn["role"] == "user")
    ids = plain_ids(tokenizer, prompt if isinstance(prompt, str) else prompt[last]["content"])

    def without(count: int) -> "Prompt":
        rest = decode_behind(tokenizer, ids[count:]).lstrip("\ufffd")
        if isinstance(prompt, str):
            return rest
        return [*prompt[:last], {**prompt[last], "content": rest}, *prompt[last + 1 :]]

    # The fewest tokens to leave out, by bisection: fewer never fit, more always do.
    counts = range(1, len(ids))
    count = bisect_left(counts, True, key=lambda count: fits(without(count)))
    return without(counts[count]) if count < len(counts) else None


def split_by_tokens(groups: Iterable[S], budget: int, *, packed: bool = False) -> Iterator[list[S]]:
    """Cut groups, in their order, into runs of at most `budget` tokens. A longer group stands alone.

    Args:
        groups: groups, or examples of several.
        budget: the most tokens of a run.
        packed: whether a prefix that several share counts once.
    """

    def added(group: S) -> int:
        return known.add(group.sequences()) if packed else len(group)

    run: list[S] = []
    used, known = 0, DistinctTokens()
    for group in groups:
        tokens = added(group)
        if run and used + tokens > budget:
            yield run
            run, used, known = [], 0, DistinctTokens()
            tokens = added(group)
        run.append(group)
        used += tokens
    if run:
        yield run


def make_batch(model: "PreTrainedModel", groups: Sequence[SharedPrompt], before: "Before | None" = None) -> Batch:
    """Return the groups as the model takes them.

    They are packed after `enable_packing`, and go on from their prompts' states after `share_prompt_states` where that
    saves enough. Else they are padded.

    Args:
        model: the scoring model.
        groups: prompts with their responses.
        before: what was computed before by the same weights, from which a packed row goes on.
    """
    if is_packing(model):
        return pack(groups, before)
    if shares_prompt_states(model) and PromptStates(lengths_of(groups)).saves:
        return share_states(groups)
    return pad(groups)


def lengths_of(groups: Sequence[SharedPrompt]) -> list[tuple[int, list[int]]]:
    """Return each group's prompt length and the lengths of its responses."""
    return [(len(group.prompt), [len(response) for response in group.responses]) for group in groups]


@dataclass(frozen=True, slots=True)
class Before:
    """Groups whose packed row was computed before, and its layout, which has kept the keys and values."""

    groups: Sequence[SharedPrompt]
    layout: PackedLayout

    @classmethod
    def of(cls, batch: "Batch", groups: Sequence[SharedPrompt]) -> "Before | None":
        """Return these groups with what their batch has kept; None if it has kept nothing."""
        layout = batch.inputs.get("layout")
        return cls(groups, layout) if isinstance(layout, PackedLayout) and layout.kept else None

    def known(self, tree: PrefixTree, groups: Sequence[SharedPrompt]) -> dict[int, int]:
        """Return {a token's index in the tree of `groups`: its index in the row before}.

        Known are the tokens of prompts, but for the last, that a prompt before begins with too: none if they are
        fewer than a quarter of the tree, which is not worth putting the keys in order.
        """
        known: dict[int, int] = {}
        rows, firsts = self.layout.tree.row, first_sequences(self.groups)
        for group, first in zip(groups, first_sequences(groups), strict=True):
            begun = group.prompt[:-1]
            shared = [common_prefix(begun, other.prompt) for other in self.groups]
            longest = max(range(len(shared)), key=shared.__getitem__)
            known |= zip(tree.row(first)[: shared[longest]], rows(firsts[longest]), strict=False)
        return known if 4 * len(known) >= len(tree.ids) else {}


def first_sequences(groups: Sequence[SharedPrompt]) -> list[int]:
    """Return the number of each group's first sequence, counted over all groups."""
    return [0, *accumulate(len(group.responses) for group in groups[:-1])]


def pack(groups: Sequence[SharedPrompt], before: Before | None = None) -> Batch:
    """Return one row in which every distinct prefix of prompts with their responses stands once.

    A token that several responses score behind the same prefix is one target. With `before`, tokens that are known from
    there are left out, unless one of them predicts a target.
    """
    tree = PrefixTree([sequence for group in groups for sequence in group.sequences()])
    targets: dict[int, int] = {}  # The row's index of each target, and its number.
    occurrences: list[int] = []
    counts: list[int] = []
    rows = map(tree.row, range(len(tree.paths)))
    for group in groups:
        for index in range(len(group.responses)):
            row = next(rows)[len(group.prompt) :]
            places = group.scored_places(index)
            occurrences += [targets.setdefault(row[at], len(targets)) for at in places]
            counts.append(len(places))
    predicting = [tree.before[at] for at in targets]
    known = before.known(tree, groups) if before else {}
    if not known.keys().isdisjoint(predicting):
        known = {}
    layout = PackedLayout(tree, known, before.layout if before else None)
    inputs = {
        "input_ids": torch.tensor([[tree.ids[at] for at in layout.own]]),
        "position_ids": torch.tensor([[tree.positions[at] for at in layout.own]]),
        "layout": layout,
    }
    columns = {at: column for column, at in enumerate(layout.own)}
    scored = [tree.ids[at] for at in targets]
    return _batch(inputs, [columns[at] for at in predicting], scored, counts, occurrences)


def share_states(groups: Sequence[SharedPrompt]) -> Batch:
    """Return one row: prompt, responses, next prompt, …; a prompt is read once, and its responses go on from there."""
    ids: list[int] = []
    positions: list[int] = []
    logit_positions: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    for group in groups:
        prompt_end = len(ids) + len(group.prompt) - 1
        ids += group.prompt
        positions += range(len(group.prompt))
        for index, response in enumerate(group.responses):
            places = group.scored_places(index)
            logit_positions += [len(ids) + at - 1 if at else prompt_end for at in places]
            positions += range(len(group.prompt), len(group.prompt) + len(response))
            ids += response
            targets += [response[at] for at in places]
            counts.append(len(places))
    layout = PromptStates(lengths_of(groups))
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions]), "layout": layout}
    return _batch(inputs, logit_positions, targets, counts)


def pad(groups: Sequence[SharedPrompt]) -> Batch:
    """Return a row for each response with its own copy of the prompt, padded on the right."""
    rows = [[*group.prompt, *response] for group in groups for response in group.responses]
    places = [
        [len(group.prompt) + at for at in group.scored_places(index)]
        for group in groups
        for index in range(len(group.responses))
    ]
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
    logit_positions = [index * width + at - 1 for index, scored in enumerate(places) for at in scored]
    targets = [row[at] for row, scored in zip(rows, places, strict=True) for at in scored]
    return _batch(inputs, logit_positions, targets, list(map(len, places)))


def _batch(
    inputs: dict[str, Any],
    logit_positions: list[int],
    targets: list[int],
    counts: list[int],
    occurrences: Sequence[int] | None = None,
) -> Batch:
    tokens = torch.tensor(counts)
    return Batch(
        inputs=inputs,
        logit_positions=torch.tensor(logit_positions),
        targets=torch.tensor(targets),
        occurrences=torch.tensor(range(len(targets)) if occurrences is None else occurrences),
        owner=torch.repeat_interleave(torch.arange(len(counts)), tokens),
        tokens=tokens.float(),
    )
