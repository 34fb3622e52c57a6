"""kl_divergence: responses + the policy that wrote them + M1 → an estimate of KL(policy ‖ M1)."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Instruction, Response, ResponseKL
from selfalign.metrics import catalog
from selfalign.models.batches import SharedPrompt, answer_of, encode_group
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.scorer import LogProbScorer
from selfalign.models.tokenizer import answer_prompt
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.stage import Size, amount, records_in, stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

logger = logging.getLogger(__name__)

MAX_BATCH_TOKENS = 2048
"""The most tokens in one forward pass."""


def size(*, answers: Artifact, **others: object) -> Size:
    """Return the number of responses."""
    return Size(f"log-probabilities of {amount(records_in(answers, 'responses'))} answers under M1", {})


@stage(size=size, all_ranks=True)
def kl_divergence(
    out: StageOutput,
    *,
    policy: Artifact,
    origin: Artifact,
    instructions: Artifact,
    answers: Artifact,
) -> Counts:
    """Estimate KL(policy ‖ M1) as the mean of log π(y|x) - log π_M1(y|x) over the policy's own responses, in nats.

    The estimate is unbiased if responses are sampled at temperature 1 and top-p 1. Narrower sampling, which is usual,
    favours likely responses, so the estimate is then about those. Weights are float32. There is no estimate if M1 has
    another tokenizer, which a model from elsewhere may have.

    Args:
        out: receives moved.jsonl.
        policy: the policy that wrote the responses.
        origin: M1.
        instructions: instructions.jsonl.
        answers: responses.jsonl.
    """
    asked = {record.id: record.prompt for record in read_records(instructions.path / "instructions.jsonl", Instruction)}
    responses = [r for r in read_records(answers.path / "responses.jsonl", Response) if r.text or r.thought]
    tokenizer, other = (PolicyCheckpoint(artifact.path).load_tokenizer() for artifact in (policy, origin))
    prompts = {name: answer_prompt(tokenizer, prompt) for name, prompt in asked.items()}
    groups: list[SharedPrompt] = [
        encode_group(tokenizer, r.id, prompts[r.instruction_id], [answer_of(r)]) for r in responses
    ]
    if not share_tokens(tokenizer, other, groups):
        logger.warning("%s: not measured, because M1 has another tokenizer", out.label)
        groups = []
    with out.journal(2 * len(groups), "answers") as journal:

        def score(model_name: str, artifact: Artifact) -> list[float]:
            scorer = LogProbScorer(PolicyCheckpoint(artifact.path).load("float32"), MAX_BATCH_TOKENS)
            return [value for [value] in scorer.score_all(groups, journal, model_name)]

        moved = [
            ResponseKL(id=group.id, policy=own, origin=other, tokens=sum(group.scored()))
            for group, own, other in zip(groups, score("policy", policy), score("M1", origin), strict=True)
        ]
    write_records(out.path / "moved.jsonl", moved)
    if not moved:
        return {}
    nats, tokens = sum(one.policy - one.origin for one in moved), sum(one.tokens for one in moved)
    return {catalog.EVAL_KL_TO_M1.name: nats / len(moved), catalog.EVAL_KL_TO_M1_PER_TOKEN.name: nats / tokens}


def share_tokens(tokenizer: "Tokenizer", other: "Tokenizer", groups: Sequence[SharedPrompt]) -> bool:
    """Whether two tokenizers have the same tokens for all ids of these texts."""
    ids = sorted({token for group in groups for part in (group.prompt, *group.responses) for token in part})
    return tokenizer.convert_ids_to_tokens(ids) == other.convert_ids_to_tokens(ids)
