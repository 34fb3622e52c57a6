"""engine=vllm with vLLM itself, on the CPU: it writes and reads what transformers does.

SELFALIGN_VLLM_PYTHON names the interpreter of an environment with vLLM; `make vllm` makes one.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import demonstration, policy_artifact, records_artifact, weights, workspace
from builders import optimization as quick
from transformers import LlamaForCausalLM

from selfalign.core.files import write_json
from selfalign.data.turns import as_prompt
from selfalign.engines.protocol import Request, Sampling
from selfalign.engines.resident import workers_may_stay
from selfalign.engines.vllm_engine import VLLM, VLLMGenerator, VLLMTokenScorer
from selfalign.judges.expected import score_tokens
from selfalign.judges.parsing import PREFIX
from selfalign.models.batches import SharedPrompt, share_prompt
from selfalign.models.checkpoint import Policy, PolicyCheckpoint, digest_weights
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import fetch_pretrained
from selfalign.models.scorer import LogProbScorer
from selfalign.models.tokenizer import encode_prompt, stop_ids
from selfalign.stages.sft import sft

PYTHON = os.environ.get("SELFALIGN_VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="no vLLM: `make vllm`, then set SELFALIGN_VLLM_PYTHON to .venv-vllm/bin/python"
)
TOLERANCE = 2e-3
"""Between two implementations' float32 logits, nats; tokens that lie closer are a tie."""

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours of the rainbow, please, and say which one you like best.",
    "Why do bees dance?",
    "Count to ten.",
]
LONG = 24
GREEDY = Sampling(temperature=0, max_new_tokens=LONG)
WARM = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=LONG)


def engine(**changes: Any) -> VLLM:
    """Small, and quick to start: nothing is compiled."""
    options = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}
    return VLLM(python=PYTHON, dtype="float32", max_model_len=1024, options=options, **changes)


def reader_of(generator: VLLMGenerator) -> VLLMTokenScorer:
    """The same engine, to read with."""
    return VLLMTokenScorer(**{field.name: getattr(generator, field.name) for field in fields(generator)})


# --- policies ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> PolicyCheckpoint:
    """The tiny policy with heads of 32, the narrowest that vLLM takes, and weights that give varied texts."""
    return widened(tmp_path_factory.mktemp("wide"))


def widened(folder: Path, seed: int = 0, **changes: Any) -> PolicyCheckpoint:
    files = fetch_pretrained(ModelConfig(path="random:tiny"), folder)
    config = files.load("float32").model.config
    config.update({"hidden_size": 128, "head_dim": 32, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(files.path / "weights")
    write_json(files.path / "weights.json", digest_weights(files.path / "weights"))
    return PolicyCheckpoint(files.path)


@pytest.fixture(scope="module")
def adapted(wide: PolicyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> PolicyCheckpoint:
    """The wide policy with an adapter, trained so that it writes other texts."""
    return taught(wide, tmp_path_factory.mktemp("adapted"), "Bees, and rivers.")


def taught(wide: PolicyCheckpoint, folder: Path, answer: str) -> PolicyCheckpoint:
    lessons = [demonstration(str(n), question, answer) for n, question in enumerate(QUESTIONS)]
    given, policy = records_artifact(folder / "given", demonstrations=lessons), policy_artifact(wide)
    out, settings = workspace(folder / "policy"), quick(learning_rate=5e-3, epochs=2)
    sft(out, policy=policy, base=policy, demonstrations=given, optimization=settings, weights=weights(rank=4))
    return PolicyCheckpoint(out.path)


@pytest.fixture(scope="module", params=["wide", "adapted", pytest.param("smollm2", marks=pytest.mark.real_model)])
def files(request: pytest.FixtureRequest) -> PolicyCheckpoint:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def generator(files: PolicyCheckpoint) -> Iterator[VLLMGenerator]:
    with engine().load(files) as generator:
        yield generator


@pytest.fixture(scope="module")
def policy(files: PolicyCheckpoint) -> Policy:
    """The same policy in transformers, its adapter merged."""
    return files.load("float32", device="cpu")


def requests(files: PolicyCheckpoint, seeds: Sequence[int] = (0,)) -> list[Request]:
    tokenizer = files.load_tokenizer()
    return [Request(prompt=encode_prompt(tokenizer, as_prompt(asked)), seeds=list(seeds)) for asked in QUESTIONS]


# --- what is compared --------------------------------------------------------------------------------------------


@torch.no_grad()
def shortfalls(policy: Policy, prompt: list[int], written: list[int]) -> list[float]:
    """By how many nats each written token is less likely than the likeliest there."""
    logits = policy.model(input_ids=torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
    return (logits.max(-1).values - logits.gather(1, torch.tensor(written)[:, None])[:, 0]).tolist()


def test_greedy_texts_are_those_of_transformers_up_to_ties(
    files: PolicyCheckpoint, generator: VLLMGenerator, policy: Policy, record_property: Any
) -> None:
    stops = stop_ids(generator.tokenizer)
    asked = requests(files)
    settings = {"temperature": 0.0, "max_tokens": LONG, "stop_token_ids": stops}
    written = [ids for [ids] in generator.ask(asked, settings, "ids")]
    behind = [gap for one, ids in zip(asked, written, strict=True) for gap in shortfalls(policy, one.prompt, ids)]
    ties = sum(gap > 0 for gap in behind)
    record_property("tokens", len(behind))
    record_property("ties", ties)
    assert max(behind) <= TOLERANCE
    assert ties <= 0.02 * len(behind)
    assert len({tuple(ids) for ids in written}) == len(QUESTIONS)
    for ids, [completion] in zip(written, generator.generate(asked, GREEDY), strict=True):
        assert completion.tokens == len(ids)
        assert not set(ids[:-1]) & set(stops)
        assert (completion.finish_reason == "eos") == (ids[-1] in stops)


def test_sampled_texts_are_those_of_their_seeds(files: PolicyCheckpoint, generator: VLLMGenerator) -> None:
    asked = requests(files, seeds=[1, 2, 3])
    once, again = generator.generate(asked, WARM), generator.generate(asked, WARM)
    assert once == again
    assert all(len({completion.text for completion in group}) == 3 for group in once)
    swapped = generator.generate([Request(prompt=one.prompt, seeds=one.seeds[::-1]) for one in asked], WARM)
    same = [a == b for group, other in zip(once, swapped, strict=True) for a, b in zip(group, other[::-1], strict=True)]
    # A draw may fall between two tokens otherwise where another batch rounds otherwise.
    assert sum(same) >= 0.9 * len(same)


@torch.no_grad()
def test_first_tokens_are_drawn_from_the_nucleus_by_their_probability(
    files: PolicyCheckpoint, generator: VLLMGenerator, policy: Policy
) -> None:
    [one, *_] = requests(files, seeds=range(400))
    logits = policy.model(input_ids=torch.tensor([one.prompt])).logits[0, -1]
    shares, tokens = logits.softmax(-1).sort(descending=True)
    size = int((shares.cumsum(0) < 0.7).sum()) + 1
    settings = {"temperature": 1.0, "top_p": 0.7, "max_tokens": 1}
    [drawn] = generator.ask([one], settings, "ids")
    counts = torch.tensor([sum(ids == [int(token)] for ids in drawn) for token in tokens[:size]])
    assert counts.sum() == 400
    expected = shares[:size] / shares[:size].sum()
    assert (counts / 400 - expected).abs().max() < 0.1


def test_log_probabilities_of_scores_are_those_of_transformers(
    files: PolicyCheckpoint, generator: VLLMGenerator, policy: Policy
) -> None:
    digits = score_tokens(generator.tokenizer, 0, 5)
    prompts = [encode_prompt(generator.tokenizer, as_prompt(asked), PREFIX) for asked in QUESTIONS]
    groups: list[SharedPrompt] = [
        share_prompt("alike", prompts[:2], [[], []]),
        *(
            SharedPrompt(id=str(n), prompt=prompt, responses=[[], [7, 9]], num_context_tokens=[0, 0])
            for n, prompt in enumerate(prompts)
        ),
    ]
    read = reader_of(generator).next_token_logprobs(groups, digits)
    scored = LogProbScorer(PolicyCheckpoint(files.path).load("float32", device="cpu"), 4096).next_token_logprobs(
        groups, digits
    )
    for rows, others in zip(read, scored, strict=True):
        for row, other in zip(rows, others, strict=True):
            assert row == pytest.approx(other, abs=TOLERANCE)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", generator.counts["vllm_version"])


def test_adapter_changes_what_is_written(wide: PolicyCheckpoint, adapted: PolicyCheckpoint) -> None:
    """Else the comparisons with the merged weights would hold without it."""
    prompt = requests(wide)[0].prompt
    plain, merged = (shortfalls(files.load("float32"), prompt, [5, 6, 7]) for files in (wide, adapted))
    assert max(abs(a - b) for a, b in zip(plain, merged, strict=True)) > 20 * TOLERANCE


@pytest.mark.parametrize("kind", ["tied", "own head", "adapter"])
def test_resident_engine_writes_and_reads_what_a_fresh_one_does(
    kind: str, wide: PolicyCheckpoint, adapted: PolicyCheckpoint, tmp_path: Path
) -> None:
    first, second = {
        "tied": lambda: (wide, widened(tmp_path / "second", seed=1)),
        "own head": lambda: [widened(tmp_path / str(n), seed=n, tie_word_embeddings=False) for n in (1, 2)],
        "adapter": lambda: (adapted, taught(wide, tmp_path / "second", "Three, or four.")),
    }[kind]()

    def work(files: PolicyCheckpoint) -> tuple[int, Any]:
        with engine(resident=True).load(files) as generator:
            greedy, warm = (generator.generate(requests(files, seeds=[1, 2]), how) for how in (GREEDY, WARM))
            group = SharedPrompt(id="", prompt=[5, 6], responses=[[7], [8, 9]], num_context_tokens=[0, 0])
            return id(generator.workers[0]), (greedy, warm, reader_of(generator).next_token_logprobs([group], [11, 12]))

    fresh, before = work(second)[1], None
    with workers_may_stay():
        for files in (first, second, first, second):
            worker, made = work(files)
            assert before in (None, worker)
            assert (made == fresh) == (files is second)
            before = worker
