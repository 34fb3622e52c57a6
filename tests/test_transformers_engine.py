"""Writing: parity with transformers' engine, random streams, stopping, and the drawing of tokens."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

from selfalign.core.errors import SelfalignError
from selfalign.core.records import FinishReason
from selfalign.engines import transformers
from selfalign.engines.protocol import Completion, Request, Sampling
from selfalign.engines.transformers import Transformers, TransformersGenerator, draw_tokens, draw_uniforms, fill_gaps
from selfalign.models.checkpoint import Policy, PolicyCheckpoint
from selfalign.models.tokenizer import decode_response, encode_prompt, end_of_turn_id

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
WARM = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=12)
QUESTIONS = ["Why?", "Name three colours of the rainbow, please, and say which one you like best.", "Count to ten."]


def varied(policy: Policy) -> Policy:
    """The policy with larger weights in its layers: as built, its greedy texts repeat a single token."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "layers" in name and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return policy


@pytest.fixture(scope="module")
def generator(tiny_policy: PolicyCheckpoint) -> TransformersGenerator:
    loaded = Transformers(max_batch_tokens=4096, dtype="float32").load(tiny_policy)
    varied(loaded.policy)
    return loaded


@pytest.fixture(scope="module")
def windowed(tiny_policy: PolicyCheckpoint) -> TransformersGenerator:
    """A model that sees no further back than eight tokens, less than any prompt."""
    loaded = tiny_policy.load("float32")
    config = {name: getattr(loaded.model.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MistralForCausalLM(
            MistralConfig(
                **config,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                sliding_window=8,
                bos_token_id=None,
                eos_token_id=2,
            )
        )
    return TransformersGenerator(varied(Policy(model.eval(), loaded.tokenizer, "")), 4096)


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer: Any) -> list[list[int]]:
    return [encode_prompt(tiny_tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]


def stopping_at(generator: TransformersGenerator, token: int) -> TransformersGenerator:
    """The generator with another stop token, since a random model hardly ever ends a turn."""
    other = TransformersGenerator(generator.policy, generator.max_batch_tokens)
    other.stops = torch.tensor([token])
    return other


def generated_by_transformers(policy: Policy, prompt: list[int], stops: Sequence[int]) -> list[int]:
    ids = torch.tensor([prompt])
    whole = policy.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=GREEDY.max_new_tokens,
        eos_token_id=list(stops),
        pad_token_id=policy.tokenizer.pad_token_id,
    )
    return whole[0, len(prompt) :].tolist()


def texts(completions: list[list[Completion]]) -> list[list[str]]:
    return [[completion.text for completion in group] for group in completions]


@pytest.mark.parametrize("kind", ["generator", "windowed"])
def test_greedy_texts_equal_transformers_generate_with_and_without_a_stop(
    request: pytest.FixtureRequest, kind: str, prompts: list[list[int]]
) -> None:
    generator: TransformersGenerator = request.getfixturevalue(kind)
    free = [generated_by_transformers(generator.policy, prompt, [2]) for prompt in prompts]
    assert [len(ids) for ids in free] == [GREEDY.max_new_tokens] * 3
    # A token that ends the first prompt's text early, and the others' elsewhere or never.
    stop = next(token for token in free[0][2:] if free[0].index(token) >= 2)
    stopping = stopping_at(generator, stop)
    lengths = set()
    for writer, stops in ((generator, [2]), (stopping, [stop])):
        written = writer.generate([Request(prompt=prompt, seeds=[0]) for prompt in prompts], GREEDY)
        for prompt, (completion,) in zip(prompts, written, strict=True):
            ids = generated_by_transformers(generator.policy, prompt, stops)
            assert completion.text == decode_response(generator.tokenizer, ids)
            assert completion.tokens == len(ids)
            lengths.add(len(ids))
    assert len(lengths) > 1, "nothing stopped early, so rows were never removed from the batch"


def test_stopping_gives_the_reason_and_cuts_behind_the_stop_token(
    generator: TransformersGenerator, prompts: list[list[int]]
) -> None:
    free = generated_by_transformers(generator.policy, prompts[0], [2])
    stop = next(token for token in free[2:] if free.index(token) >= 2)
    at = free.index(stop)
    written = stopping_at(generator, stop).generate([Request(prompt=prompts[0], seeds=[0])], GREEDY)[0][0]
    assert written.finish_reason is FinishReason.EOS
    assert written.tokens == at + 1
    assert written.text == decode_response(generator.tokenizer, free[: at + 1])
    whole = generator.generate([Request(prompt=prompts[0], seeds=[0])], GREEDY)[0][0]
    assert whole.finish_reason is FinishReason.LENGTH
    assert whole.tokens == GREEDY.max_new_tokens


def test_a_stop_token_in_the_last_place_still_counts_as_ended(
    generator: TransformersGenerator, prompts: list[list[int]]
) -> None:
    free = generated_by_transformers(generator.policy, prompts[0], [2])
    at = next(i for i in range(2, len(free)) if free.index(free[i]) == i)
    sampling = Sampling(temperature=0.0, max_new_tokens=at + 1)
    (ended,) = stopping_at(generator, free[at]).generate([Request(prompt=prompts[0], seeds=[0])], sampling)[0]
    assert (ended.finish_reason, ended.tokens) == (FinishReason.EOS, at + 1)


def test_models_own_end_of_turn_stops_it(generator: TransformersGenerator, prompts: list[list[int]]) -> None:
    end = end_of_turn_id(generator.tokenizer)
    assert generator.stops.tolist() == [end]
    head = generator.policy.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([end]), 1e4))
    try:
        (completion,) = generator.generate([Request(prompt=prompts[0], seeds=[3])], WARM)[0]
    finally:
        hook.remove()
    assert completion == Completion(text="", finish_reason=FinishReason.EOS, tokens=1, ids=[end])


@pytest.mark.parametrize("count", [1, 5])
def test_no_more_than_max_new_tokens_are_written(
    generator: TransformersGenerator, prompts: list[list[int]], count: int
) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=count)
    for group in generator.generate([Request(prompt=prompt, seeds=[1, 2]) for prompt in prompts], sampling):
        assert [completion.tokens for completion in group] == [count, count]


def test_a_completion_is_the_same_alone_in_a_batch_and_in_another_order(
    generator: TransformersGenerator, prompts: list[list[int]]
) -> None:
    requests = [Request(prompt=prompt, seeds=[10 + i, 20 + i]) for i, prompt in enumerate(prompts)]
    together = texts(generator.generate(requests, WARM))
    alone = [texts(generator.generate([request], WARM))[0] for request in requests]
    backwards = texts(generator.generate(requests[::-1], WARM))[::-1]
    single = [
        [texts(generator.generate([Request(prompt=r.prompt, seeds=[seed])], WARM))[0][0] for seed in r.seeds]
        for r in requests
    ]
    assert together == alone == backwards == single


def test_members_that_end_do_not_disturb_those_that_go_on(
    generator: TransformersGenerator, prompts: list[list[int]]
) -> None:
    requests = [Request(prompt=prompt, seeds=list(range(4, 8))) for prompt in prompts]
    free = generator.generate(requests, WARM)
    ids = generator.tokenizer(free[1][2].text, add_special_tokens=False)["input_ids"]
    stopping = stopping_at(generator, ids[len(ids) // 2])
    together = stopping.generate(requests, WARM)
    reasons = {completion.finish_reason for group in together for completion in group}
    assert reasons == {FinishReason.EOS, FinishReason.LENGTH}
    for request, group in zip(requests, together, strict=True):
        for seed, completion in zip(request.seeds, group, strict=True):
            assert stopping.generate([Request(prompt=request.prompt, seeds=[seed])], WARM) == [[completion]]


def test_seeds_decide_the_text(generator: TransformersGenerator, prompts: list[list[int]]) -> None:
    (first,) = generator.generate([Request(prompt=prompts[0], seeds=[1, 2, 1])], WARM)
    assert first[0] == first[2]
    assert first[0].text != first[1].text
    assert generator.generate([Request(prompt=prompts[0], seeds=[1, 2, 1])], WARM) == [first]
    torch.manual_seed(99)
    torch.rand(7)
    assert generator.generate([Request(prompt=prompts[0], seeds=[1, 2, 1])], WARM) == [first]


def test_a_shorter_limit_writes_the_beginning_of_the_same_text(
    generator: TransformersGenerator, prompts: list[list[int]]
) -> None:
    request = [Request(prompt=prompts[1], seeds=[5])]
    long = generator.generate(request, WARM)[0][0].text
    short = generator.generate(request, Sampling(temperature=1.0, top_p=0.9, max_new_tokens=4))[0][0].text
    assert short
    assert long.startswith(short.rstrip("�"))


def test_uniforms_come_from_each_seed_alone() -> None:
    both = draw_uniforms([4, 9], WARM)
    assert both.shape == (2, 12)
    assert torch.equal(both[1:], draw_uniforms([9], WARM))
    assert not torch.equal(both[0], both[1])
    assert bool(((both >= 0) & (both < 1)).all())


def nucleus(logits: Tensor, sampling: Sampling) -> dict[int, float]:
    """{token: probability} of the smallest set with at least top_p, by brute force in float64, renormalised."""
    probabilities = (logits.double() / sampling.temperature).softmax(0).tolist()
    kept: dict[int, float] = {}
    for token in sorted(range(len(probabilities)), key=lambda t: -probabilities[t]):
        kept[token] = probabilities[token]
        if sum(kept.values()) >= sampling.top_p:
            break
    return {token: p / sum(kept.values()) for token, p in kept.items()}


# The whole vocabulary is sorted when the first NUCLEUS_CANDIDATES do not reach top_p.
@pytest.mark.parametrize("candidates", [2, 8, 256], ids=["fallback", "some", "all"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.9), (0.7, 0.5), (1.5, 1.0), (0.3, 0.05), (2.0, 0.999)])
def test_evenly_spread_uniforms_draw_the_nucleus_in_its_proportions(
    monkeypatch: pytest.MonkeyPatch, candidates: int, temperature: float, top_p: float
) -> None:
    monkeypatch.setattr(transformers, "NUCLEUS_CANDIDATES", candidates)
    sampling = Sampling(temperature=temperature, top_p=top_p)
    count = 4000
    uniforms = (torch.arange(count) + 0.5) / count
    for seed in range(3):
        logits = torch.randn(23, generator=torch.Generator().manual_seed(seed)) * 2
        drawn = draw_tokens(logits.expand(count, -1), uniforms, sampling)
        shares = {
            token: n / count for token, n in zip(*map(Tensor.tolist, drawn.unique(return_counts=True)), strict=True)
        }
        expected = nucleus(logits, sampling)
        assert shares.keys() <= expected.keys()
        for token, probability in expected.items():
            # The grid is exact to one cell at either end.
            assert shares.get(token, 0.0) == pytest.approx(probability, abs=2 / count)


def test_the_most_likely_token_is_drawn_where_it_alone_reaches_top_p() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    for uniform in (0.0, 0.5, 0.9999999):
        assert draw_tokens(logits, torch.tensor([uniform]), Sampling(temperature=1.0, top_p=0.5)).tolist() == [1]


def test_nucleus_worked_by_hand() -> None:
    # Probabilities 0.5, 0.3, 0.2 of tokens 2, 0, 1. At top_p = 0.6 the nucleus is {2, 0}: 0.625 and 0.375.
    logits = torch.tensor([0.3, 0.2, 0.5]).log()
    uniforms = torch.tensor([0.0, 0.62, 0.63, 0.999])
    assert draw_tokens(logits.expand(4, -1), uniforms, Sampling(temperature=1.0, top_p=0.6)).tolist() == [2, 2, 0, 0]
    assert draw_tokens(logits.expand(4, -1), uniforms, Sampling(temperature=1.0, top_p=0.9)).tolist() == [2, 0, 0, 1]


def test_random_draws_follow_the_distribution() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -3.0])
    sampling = Sampling(temperature=0.8, top_p=0.97)
    count = 20_000
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(0))
    drawn = draw_tokens(logits.expand(count, -1), uniforms, sampling)
    for token, probability in nucleus(logits, sampling).items():
        # Four standard deviations of a share.
        tolerance = 4 * (probability * (1 - probability) / count) ** 0.5
        assert float((drawn == token).float().mean()) == pytest.approx(probability, abs=tolerance)


def test_greedy_takes_the_most_likely_token_whatever_the_uniform() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0], [5.0, 1.0, 3.0]])
    assert draw_tokens(logits, torch.tensor([0.0, 0.99]), Sampling(temperature=0.0)).tolist() == [2, 0]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.0), Sampling(temperature=1.0, top_p=1.0), Sampling(temperature=0.7, top_p=0.9)],
    ids=["greedy", "whole", "nucleus"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_drawn_where_a_logit_is_not_finite(value: float, sampling: Sampling) -> None:
    logits = torch.zeros(3, 300)
    logits[1, 7] = value
    with pytest.raises(SelfalignError, match="next-token probabilities are not finite"):
        draw_tokens(logits, torch.full((3,), 0.5), sampling)


def test_temperature_that_no_logit_can_be_divided_by_is_refused() -> None:
    logits = torch.tensor([[0.5, 30.0, -2.0]])
    assert draw_tokens(logits, torch.tensor([0.9]), Sampling(temperature=1e-9, top_p=1.0)).tolist() == [1]
    with pytest.raises(SelfalignError, match="temperature=1e-40 is too close to 0"):
        draw_tokens(logits, torch.tensor([0.9]), Sampling(temperature=1e-40, top_p=1.0))


def test_whole_vocabulary_is_sorted_for_the_rows_that_need_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "NUCLEUS_CANDIDATES", 3)
    sorted_rows: list[int] = []
    original = Tensor.sort

    def sort(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        sorted_rows.append(len(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "sort", sort)
    logits = torch.zeros(5, 40)
    logits[[0, 1, 3], 7] = 20.0
    drawn = draw_tokens(logits, torch.full((5,), 0.5), Sampling(temperature=1.0, top_p=0.9))
    assert sorted_rows == [2]
    assert drawn[[0, 1, 3]].tolist() == [7, 7, 7]
    draw_tokens(logits, torch.full((5,), 0.5), Sampling(temperature=1.0, top_p=1.0))
    assert sorted_rows == [2], "without a nucleus nothing has to be sorted"


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    for top_p in (0.9, 1.0):
        for uniform in (0.0, 0.5, 1 - 2**-24):
            drawn = draw_tokens(logits, torch.tensor([uniform]), Sampling(temperature=1.0, top_p=top_p))
            assert drawn.item() in (1, 3), (top_p, uniform)


def test_rows_are_drawn_independently_even_if_one_of_them_needs_the_whole_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transformers, "NUCLEUS_CANDIDATES", 2)
    sampling = Sampling(temperature=1.0, top_p=0.9)
    flat = torch.randn(30, generator=torch.Generator().manual_seed(1)) * 0.1
    peaked = torch.randn(30, generator=torch.Generator().manual_seed(2))
    peaked[4] += 8
    uniforms = torch.tensor([0.7, 0.95])
    together = draw_tokens(torch.stack([flat, peaked]), uniforms, sampling).tolist()
    alone = [draw_tokens(row[None], u[None], sampling).item() for row, u in zip((flat, peaked), uniforms, strict=True)]
    assert together == alone
    assert together[1] == 4


@pytest.mark.parametrize(
    ("ended", "rows"),
    [
        ([False, False], [0, 1]),
        ([True, True], []),
        ([True, False, False, False], [3, 1, 2]),
        ([False, False, True], [0, 1]),
        ([True, False, True, False, True, False], [5, 1, 3]),
        ([], []),
    ],
)
def test_last_rows_take_the_places_of_those_that_ended(ended: list[bool], rows: list[int]) -> None:
    assert fill_gaps(ended) == rows


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("budget", [1, 100, 400, 100_000])
def test_plan_covers_every_index_once_within_the_budget(
    generator: TransformersGenerator, budget: int, samples: int
) -> None:
    lengths = torch.randint(1, 90, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    planned = TransformersGenerator(generator.policy, budget).plan(lengths, samples, 10)
    assert sorted(index for batch in planned for index in batch) == list(range(40))
    for batch in planned:
        width = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * samples * (width + 10) <= budget
    if budget == 100_000:
        assert len(planned) == 1
    # No batch could have taken the first of the next one.
    for batch, following in pairwise(planned):
        assert (len(batch) + 1) * samples * (lengths[batch[0]] + 10) > budget
        assert lengths[batch[-1]] >= lengths[following[0]]


def test_plan_depends_on_the_lengths_alone_and_breaks_ties_by_order(generator: TransformersGenerator) -> None:
    small = TransformersGenerator(generator.policy, 60)
    assert small.plan([5, 9, 5, 9], 1, 11) == [[1, 3, 0], [2]]
    assert small.plan([], 1, 11) == []


def test_what_the_generator_tells_of_its_policy(
    generator: TransformersGenerator, tiny_policy: PolicyCheckpoint
) -> None:
    assert generator.digest == tiny_policy.digest
    assert generator.context == 2048
    assert generator.tokenizer is generator.policy.tokenizer


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Transformers, {"max_batch_tokens": 0}, r"engine\.max_batch_tokens must be 1 or more, got 0"),
        (
            Transformers,
            {"dtype": "float16"},
            r"engine\.dtype must be auto or one of float32, bfloat16; got 'float16'",
        ),
    ],
)
def test_bad_options_are_refused_by_name(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelfalignError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"judge\.sampling\.temperature must be 0 or more, got -0.1"),
        ({"top_p": 0.0}, r"judge\.sampling\.top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, r"judge\.sampling\.top_p must be above 0 and at most 1, got 1.1"),
        ({"max_new_tokens": 0}, r"judge\.sampling\.max_new_tokens must be 1 or more, got 0"),
    ],
)
def test_bad_sampling_is_refused_by_the_name_it_has_where_it_stands(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelfalignError, match=message):
        Sampling(**options).check("judge.sampling")


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 1.0}, {"max_new_tokens": 1}])
def test_sampling_at_the_ends_of_its_ranges_is_accepted(options: dict[str, Any]) -> None:
    Sampling(**options).check("judge.sampling")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_loaded_in_the_dtype_asked_for(tiny_policy: PolicyCheckpoint, dtype: str) -> None:
    loaded = Transformers(dtype=dtype).load(tiny_policy)
    assert loaded.policy.model.dtype == getattr(torch, dtype)
