from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    RUBRIC,
    demonstration,
    loaded,
    nudged_policy,
    optimization,
    policy_artifact,
    records_artifact,
    weights,
    workspace,
)
from mutation import mutated
from safetensors.torch import load_file
from test_tokenizer import WITH_BOS, WITHOUT_BOS, build_tokenizer

from selfalign.core.errors import SelfalignError
from selfalign.core.files import write_json
from selfalign.core.records import Demonstration, RankedAnswers
from selfalign.models.checkpoint import PolicyCheckpoint, digest_weights
from selfalign.models.config import ModelConfig
from selfalign.stages import sft as sft_module
from selfalign.stages.judge import ExpectedScore
from selfalign.stages.load_model import load_model
from selfalign.stages.seed_data import demonstrate_judging

TAUGHT = [
    demonstration("a", "Name a bird.", "A wren."),
    demonstration("b", "Name a fish.", "A cod."),
    demonstration("c", "Name a tree that grows near rivers.", "A willow, or an alder."),
]
QUICK = {"learning_rate": 5e-3, "epochs": 4, "batch_size": 3}


def trained(
    folder: Path,
    policy: PolicyCheckpoint,
    records: list[Demonstration] = TAUGHT,
    seed: int = 0,
    stage: Any = sft_module,
    **settings: object,
):
    """Runs the stage; returns its counts, the policy and the rows it logged."""
    rows: list[dict] = []
    start = policy_artifact(policy)
    counts = stage.sft(
        workspace(folder / "out", rows),
        policy=start,
        base=start,
        demonstrations=records_artifact(folder / "given", demonstrations=records),
        optimization=optimization(**{**QUICK, **settings}),
        weights=weights(seed),
    )
    return counts, PolicyCheckpoint(folder / "out"), rows


def log_likelihood(policy: PolicyCheckpoint, asked: str, answer: str) -> float:
    """Of an answer and its end of turn, from full logits."""
    loaded_policy = policy.load("float32", device="cpu")
    prompt = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    start = len(loaded_policy.tokenizer(prompt)["input_ids"])
    ids = torch.tensor([loaded_policy.tokenizer(f"{prompt}{answer}<|im_end|>")["input_ids"]])
    with torch.no_grad():
        logps = loaded_policy.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return float(logps.gather(1, ids[0, 1:, None])[start - 1 :].sum())


def test_answers_and_their_ends_become_likelier(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    counts, policy, rows = trained(tmp_path, tiny_policy)
    before = sum(log_likelihood(tiny_policy, d.prompt[0]["content"], d.response) for d in TAUGHT)
    after = sum(log_likelihood(policy, d.prompt[0]["content"], d.response) for d in TAUGHT)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert after > before + 10
    tokenizer = loaded(tiny_policy.path).tokenizer
    targets = sum(len(tokenizer(f"{d.response}<|im_end|>")["input_ids"]) for d in TAUGHT)
    assert rows[0]["loss"] == pytest.approx(-before / targets, rel=1e-4)
    assert rows[0]["loss_per_token"] == pytest.approx(-before / targets, rel=1e-4)
    assert counts["demonstrations"] == 3
    assert counts["dropped"] == {"too_long": 0}


JUDGED = Demonstration(
    id="j", prompt=[{"role": "user", "content": "Grade: It is."}], response="5", source="eft", prefill="Score: "
)


def check_tokens(stage: Any = sft_module) -> None:
    """Template, one BOS at most, and as the target the response with the one end of its turn."""
    for adds_bos in (True, False):
        for template in (WITH_BOS, WITHOUT_BOS):
            tokenizer = build_tokenizer(adds_bos=adds_bos, template=template)
            bos = "<s>" if adds_bos or template == WITH_BOS else ""
            for record, shown, target in (
                (demonstration("a", "Why so?", "It is."), "[user]Why so?<|end|>[assistant]", "It is.<|end|>"),
                (JUDGED, "[user]Grade: It is.<|end|>[assistant]Score: ", "5<|end|>"),
            ):
                encoded = stage.encode_demonstration(tokenizer, record)
                assert tokenizer.decode(encoded.prompt) == bos + shown
                assert tokenizer.decode(encoded.response) == target
                ids = [*encoded.prompt, *encoded.response]
                assert ids.count(tokenizer.bos_token_id) == bool(bos)
                assert ids[-1] == tokenizer.convert_tokens_to_ids("<|end|>")


def test_demonstration_is_in_the_template_with_one_bos_and_ends_its_turn() -> None:
    check_tokens()


def check_loss(folder: Path, policy: PolicyCheckpoint, stage: Any = sft_module) -> None:
    """The first step's loss is that of the targets and their ends alone, from full logits worked out apart.

    The policy is one whose tokens differ in their loss, as fresh weights find all alike.
    """
    policy = nudged_policy(policy, folder / "nudged", size=0.2)
    _, _, rows = trained(folder, policy, stage=stage, epochs=1)
    tokenizer = loaded(policy.path).tokenizer
    likelihood = sum(log_likelihood(policy, d.prompt[0]["content"], d.response) for d in TAUGHT)
    targets = sum(len(tokenizer(f"{d.response}<|im_end|>")["input_ids"]) for d in TAUGHT)
    assert rows[0]["loss"] == pytest.approx(-likelihood / targets, rel=1e-4)


def test_loss_is_on_target_tokens_alone(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    check_loss(tmp_path, tiny_policy)


ANSWER = "answer = Answer(text=record.response, ids=record.ids, thought=record.thought)"
ENCODED = "return Encoded(record, ids, response)"
PROMPTS, RESPONSES = "[one.prompt for one in rows]", "[one.response for one in rows]"
MUTANTS = [
    ("no end of turn", ANSWER, ANSWER.replace("ids=record.ids", "finished=bool(record.prefill)")),
    ("no end of a judgement's turn", ANSWER, ANSWER.replace("ids=record.ids", "finished=not record.prefill")),
    ("two BOS", ENCODED, ENCODED.replace("ids,", "[tokenizer.bos_token_id or 0, *ids],")),
    ("BOS in the target", ENCODED, ENCODED.replace("response)", "[tokenizer.bos_token_id or 0, *response])")),
    ("the prefill among the targets", "encode_answers(tokenizer, prompt, [answer], record.prefill)",
     "encode_answers(tokenizer, prompt, [Answer(text=record.prefill + record.response)])"),
    ("loss on the prompt", f"{PROMPTS}, {RESPONSES}",
     f"{PROMPTS.replace('prompt for', 'prompt[:1] for')}, [one.prompt[1:] + one.response for one in rows]"),
    ("mask shifted by one", f"{PROMPTS}, {RESPONSES}",
     "[one.prompt + one.response[:1] for one in rows], [one.response[1:] for one in rows]"),
    ("no loss on the end", f"{PROMPTS}, {RESPONSES}", f"{PROMPTS}, [one.response[:-1] for one in rows]"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_mutant_is_caught(tmp_path: Path, tiny_policy: PolicyCheckpoint, old: str, new: str) -> None:
    with mutated(sft_module, old, new) as copy:
        failures = 0
        for check, arguments in ((check_tokens, ()), (check_loss, (tmp_path, tiny_policy))):
            try:
                check(*arguments, copy)
            except AssertionError:
                failures += 1
    assert failures


def test_loss_over_examples_weighs_each_answer_alike(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    _, _, rows = trained(tmp_path, tiny_policy, loss_reduction="examples", epochs=1)
    tokenizer = loaded(tiny_policy.path).tokenizer
    means = [
        -log_likelihood(tiny_policy, d.prompt[0]["content"], d.response)
        / len(tokenizer(f"{d.response}<|im_end|>")["input_ids"])
        for d in TAUGHT
    ]
    assert rows[0]["loss"] == pytest.approx(sum(means) / 3, rel=1e-4)


def test_same_seed_gives_the_same_weights_and_another_order_others(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    settings = {"batch_size": 1, "epochs": 2}
    digests = [
        trained(tmp_path / str(n), tiny_policy, seed=seed, **settings)[1].digest for n, seed in enumerate((1, 1, 2))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_longer_demonstrations_are_dropped_and_counted(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    records = [*TAUGHT, demonstration("long", "Go on.", "and on " * 60)]
    with_long, policy, _ = trained(tmp_path / "with", tiny_policy, records, max_length=60)
    _, without, _ = trained(tmp_path / "without", tiny_policy, TAUGHT, max_length=60)
    assert with_long["dropped"] == {"too_long": 1}
    assert with_long["demonstrations"] == 3
    assert policy.digest == without.digest


def test_demonstrations_that_all_are_too_long_are_an_error(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    with pytest.raises(SelfalignError, match=r"none of 3 demonstrations fits into train\.sft\.max_length"):
        trained(tmp_path, tiny_policy, max_length=4)


def test_every_judgement_of_one_question_counts_when_one_of_them_is_too_long(
    tmp_path: Path, tiny_policy: PolicyCheckpoint
) -> None:
    """Answers to one question share their prompt; the long one alone is dropped, and it is counted once."""
    question = RankedAnswers(
        id="q", instruction="Why?", texts=["Because.", "So.", "on and " * 60], ranks=[1, 2, 3], scores=[5, 3, 0],
        justifications=["", "", ""],
    )  # fmt: skip
    records = [*TAUGHT, *demonstrate_judging(question, ExpectedScore(prompt=RUBRIC))]
    counts, _, _ = trained(tmp_path, tiny_policy, records, epochs=1, max_length=120)
    assert counts["demonstrations"] + counts["dropped"]["too_long"] == len(records)
    assert counts["demonstrations"] == 5


def test_sharing_a_prompt_teaches_what_separate_prompts_teach(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    question = RankedAnswers(
        id="q", instruction="Why?", texts=["Because.", "So.", "No idea."], ranks=[1, 2, 3], scores=[5, 3, 0],
        justifications=["", "", ""],
    )  # fmt: skip
    together = demonstrate_judging(question, ExpectedScore(prompt=RUBRIC))
    apart = [
        Demonstration(id=d.id, prompt=d.prompt, response=d.response, source="eft", question=f"q{n}", prefill=d.prefill)
        for n, d in enumerate(together)
    ]
    counts, shared, _ = trained(tmp_path / "shared", tiny_policy, together, epochs=1)
    separate, alone, _ = trained(tmp_path / "alone", tiny_policy, apart, epochs=1)
    tokenizer = tiny_policy.load_tokenizer()
    lengths = [len(sft_module.encode_demonstration(tokenizer, one)) for one in apart]
    assert separate["tokens"] == sum(lengths)
    assert counts["tokens"] < 0.8 * separate["tokens"]
    one, other = (load_file(policy.path / "weights/model.safetensors") for policy in (shared, alone))
    assert all(torch.allclose(one[name], other[name], atol=2e-4) for name in one)


def test_model_without_chat_template_is_refused_with_what_to_do(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    policy = tiny_policy.load("float32")
    policy.tokenizer.chat_template = None
    policy.model.save_pretrained(tmp_path / "bare")
    policy.tokenizer.save_pretrained(tmp_path / "bare")
    config = ModelConfig(path=str(tmp_path / "bare"))
    write_json(tmp_path / "bare/weights.json", digest_weights(tmp_path / "bare"))
    load_model(workspace(tmp_path / "M0"), model=config, source="s")
    with pytest.raises(SelfalignError, match=r"no chat template.*model\.chat_template=FILE"):
        trained(tmp_path, PolicyCheckpoint(tmp_path / "M0"))
