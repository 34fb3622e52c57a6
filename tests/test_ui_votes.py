"""The chat of selfalign-ui and its votes: replies as the run has its models answer, and pairs that a run trains on."""

import json
from pathlib import Path

import pytest
from builders import TINY_RUN, composed, taught_policy
from thinking_families import FAMILIES, completion_of, thinking_model

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json, write_json
from selfalign.core.records import FinishReason
from selfalign.data.mixtures import data_source
from selfalign.data.sources import read_pairs
from selfalign.engines.protocol import Completion, Request, Sampling
from selfalign.engines.transformers import TransformersGenerator
from selfalign.models.chat_template import SYSTEM_PROMPT
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import fetch_pretrained
from selfalign.ui.chat import ChatModels, Conversation, Reply
from selfalign.ui.render import conversation_html
from selfalign.ui.run_records import RunRecords
from selfalign.ui.votes import append_vote, vote_of


def reply(
    text: str, *, model: str = "M1", thought: str = "", reason: FinishReason = FinishReason.EOS, system: str = ""
):
    return Reply(model, text, thought, reason, system)


def asked(*replies: Reply) -> Conversation:
    """A conversation whose first question was answered twice, and whose second has these replies."""
    first = Conversation().asked("What is bread?").answered([reply("Food."), reply("Baked dough.")]).keeping(1)
    return first.asked("And tea?").answered([*replies])


def test_vote_is_a_pair_behind_the_reply_that_was_kept() -> None:
    vote = vote_of(asked(reply("A drink."), reply("Leaves.", model="M2")), chosen=1)
    assert vote.prompt == [
        {"role": "user", "content": "What is bread?"},
        {"role": "assistant", "content": "Baked dough."},
        {"role": "user", "content": "And tea?"},
    ]
    assert (vote.chosen, vote.chosen_model) == ("Leaves.", "M2")
    assert (vote.rejected, vote.rejected_model) == ("A drink.", "M1")


def test_votes_are_read_and_composed_as_preference_pairs(tmp_path: Path) -> None:
    path = tmp_path / "new/votes.jsonl"
    hostile = '"},{"chosen":"no"}\n\u2028</script>'
    votes = [
        vote_of(asked(reply("A drink."), reply(hostile)), chosen=1),
        vote_of(asked(reply("One.", system="Be short."), reply("Two.", system="Be short.")), chosen=0),
        vote_of(asked(reply("So.", thought="<think>\nWhy?\n</think>\n\n"), reply("No.")), chosen=0),
    ]
    assert [append_vote(path, vote) for vote in votes] == [1, 2, 3]
    pairs, drops = read_pairs(data_source(str(path), "data.path"))
    assert +drops == {}
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        (vote.prompt, vote.chosen, vote.rejected) for vote in votes
    ]
    assert pairs[1].prompt[0] == {"role": "system", "content": "Be short."}
    assert pairs[2].chosen == "<think>\nWhy?\n</think>\n\nSo."
    config, _, _ = composed("data=pairs", f"data.path={path}", "iterations=1")
    assert str(path) in str(config.data.path)


def test_vote_goes_behind_a_line_that_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    path.write_text('{"id":"a"}\n{"id":', encoding="utf-8")
    assert append_vote(path, vote_of(asked(reply("A."), reply("B.")), chosen=0)) == 3
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"id": "a"}
    assert json.loads(lines[2])["chosen"] == "A."


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([reply("A.")], "needs replies of two models"),
        ([reply("A."), reply("B.", reason=FinishReason.LENGTH)], "was cut at the token limit"),
        ([reply("A."), reply("", reason=FinishReason.TRUNCATED)], "was cut at the token limit"),
        ([reply("A."), reply(" ")], "is empty"),
        ([reply("A."), reply("A. ", model="M2")], "same text"),
    ],
)
def test_vote_that_training_could_not_learn_from_is_refused(replies: list[Reply], message: str) -> None:
    with pytest.raises(SelfalignError, match=message):
        vote_of(asked(*replies), chosen=0)


def test_conversation_is_shown_as_text_with_its_thoughts_folded() -> None:
    html = conversation_html(asked(reply("<b>A</b>", thought="<script>1</script>"), reply("**B**")))
    assert "&lt;b&gt;A&lt;/b&gt;" in html
    assert "**B**" in html
    assert "<b>" not in html
    assert "<script>" not in html
    assert "<details><summary>Thinking</summary>" in html
    assert html.count("the conversation goes on from this") == 2


@pytest.fixture
def run_with_model(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> RunRecords:
    """A run folder whose M1 ends its turns by itself, with a system prompt."""
    taught = taught_policy(tiny_policy, tmp_path).path
    settings = taught / "tokenizer/tokenizer_config.json"
    write_json(settings, read_json(settings) | {SYSTEM_PROMPT: "Say one thing."})
    manifest = {"stage": "sft", "format": 0, "digest": "d", "inputs": {}, "counts": {}}
    write_json(taught / "manifest.json", manifest)
    (tmp_path / "run/artifacts").mkdir(parents=True)
    (tmp_path / "run/artifacts/M1").symlink_to(taught)
    _, text, _ = composed(*TINY_RUN, "evaluate.sampling.temperature=0.25")
    (tmp_path / "run/config.yaml").write_text(text, encoding="utf-8")
    return RunRecords(tmp_path / "run")


def test_model_answers_under_the_system_prompt_and_sampling_of_its_run(run_with_model: RunRecords) -> None:
    models = ChatModels([run_with_model])
    assert [*models.places()] == ["M1"]
    assert models.sampling("M1").temperature == 0.25
    greedy = Sampling(temperature=0, max_new_tokens=12)
    question = [{"role": "user", "content": "Say one thing about bread."}]
    made = models.reply("M1", question, greedy, seed=1)
    assert made.system == "Say one thing."
    assert made == models.reply("M1", question, greedy, seed=2)
    policy = PolicyCheckpoint(run_with_model.folder / "artifacts/M1").load("float32", device="cpu")
    text = policy.tokenizer.apply_chat_template(
        [{"role": "system", "content": "Say one thing."}, *question], tokenize=False, add_generation_prompt=True
    )
    ids = policy.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    written = policy.model.generate(ids, attention_mask=ids.new_ones(ids.shape), do_sample=False, max_new_tokens=12)
    expected = policy.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert made.text.strip() == expected.strip() != ""


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1", "gpt_oss"])
def test_model_that_thinks_answers_behind_its_folded_thought(
    monkeypatch: pytest.MonkeyPatch, tiny_policy: PolicyCheckpoint, tmp_path: Path, name: str
) -> None:
    """It writes a thought as its family does, or goes on from one that the prompt has opened."""
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "run/artifacts").mkdir(parents=True)
    (tmp_path / "run/artifacts/M1").symlink_to(model)
    fetch_pretrained(ModelConfig(path=str(thinking_model(tiny_policy, name, tmp_path / name))), model)
    write_json(model / "manifest.json", {"stage": "sft", "format": 0, "digest": "d", "inputs": {}, "counts": {}})
    (tmp_path / "run/config.yaml").write_text(composed(*TINY_RUN)[1], encoding="utf-8")
    asked_for: list[list[int]] = []

    def write(self: TransformersGenerator, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        asked_for.append(requests[0].prompt)
        text = f"{FAMILIES[name].thought}A wren.{FAMILIES[name].end}"
        return [[completion_of(self.tokenizer, text)]]

    monkeypatch.setattr(TransformersGenerator, "generate", write)
    models, conversation = ChatModels([RunRecords(tmp_path / "run")]), Conversation()
    for question in ("Name a bird.", "Another?"):
        conversation = conversation.asked(question)
        conversation = conversation.answered([models.reply("M1", conversation.messages(), Sampling(), seed=0)])
    for exchange in conversation.exchanges:
        [made] = exchange.replies
        assert made.text == "A wren."
        assert "Let me see." in made.thought
    html = conversation_html(conversation)
    assert html.count("<details><summary>Thinking</summary>") == 2
    assert html.index("Let me see.") < html.index("A wren.")
    tokenizer = PolicyCheckpoint(model).load_tokenizer()
    second = tokenizer.decode(asked_for[1])
    assert "A wren." in second
    assert "Let me see." not in second, "a model reads its answers again, not its thoughts"


def test_conversation_that_does_not_fit_is_refused(run_with_model: RunRecords) -> None:
    models = ChatModels([run_with_model])
    with pytest.raises(SelfalignError, match=r"do not fit into the context of \d+"):
        models.reply("M1", [{"role": "user", "content": "Hi"}], Sampling(max_new_tokens=1 << 20), seed=0)
    with pytest.raises(SelfalignError, match=r"no model 'M9'; there are M1"):
        models.reply("M9", [{"role": "user", "content": "Hi"}], Sampling(), seed=0)
