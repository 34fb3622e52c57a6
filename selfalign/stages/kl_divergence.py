"""kl_divergence: responses + the policy that wrote them + M1 → an estimate of KL(policy ‖ M1)."""

from selfalign.core.jsonl import read_records, write_records
from selfalign.core.records import Instruction, Response, ResponseKL
from selfalign.data.sources import as_prompt
from selfalign.metrics import catalog
from selfalign.models.batches import SharedPrompt, answer_of, encode_group
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.scorer import LogProbScorer
from selfalign.models.tokenizer import answer_prompt
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.stage import Size, amount, records_in, stage

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
    favours likely responses, so the estimate is then about those. Weights are float32.

    Args:
        out: receives moved.jsonl.
        policy: the policy that wrote the responses.
        origin: M1.
        instructions: instructions.jsonl.
        answers: responses.jsonl.
    """
    texts = {record.id: record.text for record in read_records(instructions.path / "instructions.jsonl", Instruction)}
    responses = [r for r in read_records(answers.path / "responses.jsonl", Response) if r.text or r.thought]
    tokenizer = PolicyCheckpoint(policy.path).load_tokenizer()
    prompts = {name: answer_prompt(tokenizer, as_prompt(text)) for name, text in texts.items()}
    groups: list[SharedPrompt] = [
        encode_group(tokenizer, r.id, prompts[r.instruction_id], [answer_of(r)]) for r in responses
    ]
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
