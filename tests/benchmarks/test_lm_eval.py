import ast
import importlib.util
import json
import math
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    ROOT,
    TINY_RUN,
    Killed,
    composed,
    loaded,
    metrics,
    run,
    small_context_policy,
    workspace,
    write_tiny_data,
)
from mutation import Check, assert_caught

from selfalign.benchmarks import lm_eval
from selfalign.benchmarks.lm_eval import LmEval
from selfalign.benchmarks.lm_eval_settings import LmEvalTask
from selfalign.benchmarks.protocol import BenchmarkContext
from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_folder
from selfalign.engines.transformers import Transformers
from selfalign.metrics.catalog import of_benchmark
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.store.artifacts import Counts

TASKS = Path(__file__).parent / "tasks"
QUIZ = [json.loads(line) for line in (TASKS / "quiz.jsonl").read_text().splitlines()]
NEEDS_LM_EVAL = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'selfalign[lm-eval]'"
)


def asked(name: str = "quiz", metric: str = "acc", num_fewshot: int | None = 0, **changes: Any) -> LmEval:
    """One task of the folder `tasks`."""
    task = LmEvalTask(name=name, metric=metric, num_fewshot=num_fewshot)
    return LmEval(**{"tasks": [task], "include_path": str(TASKS), **changes})


def measured(folder: Path, policy: PolicyCheckpoint, settings: LmEval) -> Counts:
    """What the benchmark makes of a policy; its files lie in the folder."""
    engine = Transformers(dtype="float32")
    context = BenchmarkContext(key="benchmark.lm_eval", label="M1", policy=policy, judge=None, engine=engine, seed=0)
    return settings.measure(context, workspace(folder))


def samples(folder: Path, task: str = "quiz") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"samples_{task}.jsonl").read_text().splitlines()]


def written(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digest_folder(folder, without=("scratch",)).items()}


def log_likelihood(policy: PolicyCheckpoint, context: str, ending: str) -> float:
    """log p(ending | context), nats, from full logits of this one text."""
    reader = loaded(policy.path)
    start = len(reader.tokenizer(context)["input_ids"])
    ids = torch.tensor(reader.tokenizer(context + ending)["input_ids"])
    with torch.no_grad():
        logs = reader.model(ids[None, :-1]).logits[0].log_softmax(-1)
    return float(logs[range(start - 1, len(ids) - 1), ids[start:]].sum())


# --- numbers -----------------------------------------------------------------------------------------------------


@NEEDS_LM_EVAL
@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_accuracy_is_that_of_log_likelihoods_worked_out_by_hand(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, metric: str
) -> None:
    counts = measured(tmp_path, tiny_policy, asked(metric=metric, limit=12, batch_size=4))
    right = []
    for row, sample in zip(QUIZ[:12], samples(tmp_path), strict=True):
        context = f"Question: {row['question']}\nAnswer:"
        by_hand = [log_likelihood(tiny_policy, context, f" {choice}") for choice in row["choices"]]
        assert [value for ((value, _),) in sample["resps"]] == pytest.approx(by_hand, abs=1e-3)
        lengths = [len(choice) if metric == "acc_norm" else 1 for choice in row["choices"]]
        scores = [value / length for value, length in zip(by_hand, lengths, strict=True)]
        right.append(scores.index(max(scores)) == row["answer"])
    share = sum(right) / 12
    half = 1.96 * math.sqrt(share * (1 - share) / 11)
    assert counts[f"quiz/{metric}"] == pytest.approx(share)
    assert counts[f"quiz/{metric}_low"] == pytest.approx(share - half)
    assert counts[f"quiz/{metric}_high"] == pytest.approx(share + half)
    assert counts["quiz/documents"] == 12
    assert counts["quiz/prompts_cut"] == 0
    assert counts["quiz/version"] == "1.0"


@NEEDS_LM_EVAL
def test_numbers_are_those_of_lm_eval_called_by_hand(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    counts = measured(tmp_path / "own", tiny_policy, asked(num_fewshot=2))
    plain = loaded(tiny_policy.path)
    (tmp_path / "tasks").mkdir()
    text = (TASKS / "quiz.yaml").read_text()
    for name in ("shots.jsonl", "quiz.jsonl"):
        text = text.replace(f": {name}", f": {TASKS / name}")
    (tmp_path / "tasks/quiz.yaml").write_text(text)
    by_hand = simple_evaluate(
        model=HFLM(pretrained=plain.model, tokenizer=plain.tokenizer, batch_size=8),
        tasks=["quiz"],
        num_fewshot=2,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )
    assert by_hand is not None
    of_quiz = by_hand["results"]["quiz"]
    assert counts["quiz/acc"] == of_quiz["acc,none"]
    assert counts["quiz/acc_high"] == pytest.approx(of_quiz["acc,none"] + 1.96 * of_quiz["acc_stderr,none"])
    own = samples(tmp_path / "own")
    asked_by_hand = [sample["arguments"] for sample in by_hand["samples"]["quiz"]]
    assert [sample["arguments"] for sample in own] == json.loads(json.dumps(asked_by_hand))


@NEEDS_LM_EVAL
def test_prompt_has_as_many_solved_examples_as_asked(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    for shots in (0, 2):
        measured(tmp_path / str(shots), tiny_policy, asked(num_fewshot=shots, limit=3))
        prompts = [sample["arguments"][0][0] for sample in samples(tmp_path / str(shots))]
        assert [prompt.count("Answer:") for prompt in prompts] == [shots + 1] * 3


@NEEDS_LM_EVAL
def test_chat_template_wraps_the_prompt_only_when_asked(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    for chat in (False, True):
        measured(tmp_path / str(chat), tiny_policy, asked(limit=2, apply_chat_template=chat))
        prompt = samples(tmp_path / str(chat))[0]["arguments"][0][0]
        assert prompt.startswith("<|im_start|>user\n") is chat
        assert prompt.endswith("<|im_start|>assistant\n") is chat


@NEEDS_LM_EVAL
def test_several_tasks_have_examples_and_metrics_of_their_own(tmp_path: Path, tiny_policy: PolicyCheckpoint) -> None:
    tasks = [
        LmEvalTask(name="both", metric="acc", num_fewshot=1),
        LmEvalTask(name="finish", metric="exact_match,first-word"),
    ]
    counts = measured(tmp_path, tiny_policy, asked(tasks=tasks, limit=6, average=True))
    assert counts["both/documents"] == counts["finish/documents"] == 6
    assert (counts["both/version"], counts["finish/version"]) == ("3.0", "2.0")
    assert counts["average"] == pytest.approx((counts["both/acc"] + counts["finish/exact_match"]) / 2)
    halves = [counts[f"{name}_high"] - counts[name] for name in ("both/acc", "finish/exact_match")]
    assert counts["average_high"] - counts["average"] == pytest.approx(math.hypot(*halves) / 2)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["n-shot"] == {"both": 1, "quiz": 1, "finish": 0}
    assert "samples" not in results
    answers = Counter(sample["filter"] for sample in samples(tmp_path, "finish"))
    assert answers == {"whole": 6, "first-word": 6}


@NEEDS_LM_EVAL
@pytest.mark.parametrize(("name", "metric", "context"), [("quiz", "acc", 22), ("finish", "exact_match,whole", 28)])
def test_prompts_that_do_not_fit_are_counted(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, name: str, metric: str, context: int
) -> None:
    small = small_context_policy(tiny_policy, tmp_path / "small", context)
    counts = measured(tmp_path / "out", small, asked(name, metric, limit=8))
    encode = loaded(tiny_policy.path).tokenizer
    texts = [f"Question: {row['question']}\nAnswer:" for row in QUIZ[:8]]
    room = context - 8  # for max_gen_toks
    if name == "quiz":
        texts = [f"{text} {choice}" for text, row in zip(texts, QUIZ, strict=False) for choice in row["choices"]]
        room = context + 1  # the last token is not read
    cut = sum(len(encode(text)["input_ids"]) > room for text in texts)
    assert 0 < cut < len(texts)
    assert counts[f"{name}/prompts_cut"] == cut


# --- batches, keys -----------------------------------------------------------------------------------------------


@NEEDS_LM_EVAL
def test_killed_measurement_goes_on_with_the_batch_in_flight(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    settings, sizes = asked(limit=10, batch_size=4), []
    original = HFLM._loglikelihood_tokens

    def dies(self: HFLM, requests: list[Any], *more: Any) -> Any:
        sizes.append(len(requests))
        if len(sizes) == 2:
            raise Killed
        return original(self, requests, *more)

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", dies)
    with pytest.raises(Killed):
        measured(tmp_path / "killed", tiny_policy, settings)
    resumed = measured(tmp_path / "killed", tiny_policy, settings)
    assert sizes == [16, 16, 16, 8]
    whole = measured(tmp_path / "whole", tiny_policy, settings)
    assert resumed == whole
    assert written(tmp_path / "killed") == written(tmp_path / "whole")


def test_key_follows_the_users_files_and_not_what_running_them_leaves(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    folder = tmp_path / "tasks"
    shutil.copytree(TASKS, folder)
    settings = asked(include_path=str(folder))
    first = settings.sources("benchmark.lm_eval")
    assert first.keys() == {"lm-eval", "both.yaml", "finish.yaml", "quiz.yaml", "quiz.jsonl", "shots.jsonl"}
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__/utils.pyc").write_bytes(b"compiled")
    assert settings.sources("benchmark.lm_eval") == first
    (folder / "quiz.jsonl").write_text((folder / "quiz.jsonl").read_text().replace("a cow", "the cow"))
    assert settings.sources("benchmark.lm_eval") != first


@NEEDS_LM_EVAL
def test_run_measures_every_model_and_finds_it_there_the_next_time(tmp_path: Path) -> None:
    task = "benchmark.lm_eval.tasks=[{name:quiz,metric:acc,num_fewshot:1}]"
    settings = ["benchmark=[lm_eval]", task, f"benchmark.lm_eval.include_path={TASKS}", "benchmark.lm_eval.limit=6"]
    command = [*TINY_RUN, *write_tiny_data(tmp_path / "data"), "iterations=1", *settings]
    folder = run(tmp_path / "out", *command)
    rows = {row["label"]: row for row in metrics(folder) if "lm_eval/quiz/acc" in row}
    assert rows.keys() == {"evaluation_M1/lm_eval", "evaluation_M2/lm_eval"}
    names = {name.removeprefix("lm_eval/") for row in rows.values() for name in row if name.startswith("lm_eval/")}
    assert {of_benchmark(name).name for name in names} == {
        "{benchmark}/{task}/{metric}", "{benchmark}/{task}/documents", "{benchmark}/{task}/prompts_cut",
    }  # fmt: skip
    assert (folder / "artifacts/evaluation_M2/lm_eval/results.json").exists()
    made = {path for path in (tmp_path / "out/store/benchmark").iterdir() if path.is_dir()}
    run(tmp_path / "out", *command)
    assert {path for path in (tmp_path / "out/store/benchmark").iterdir() if path.is_dir()} == made


# --- what is refused ---------------------------------------------------------------------------------------------


@NEEDS_LM_EVAL
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (asked("quizz"), r"benchmark.lm_eval: lm-eval has no task 'quizz'; did you mean .*quiz"),
        (asked("zzqxwv"), "lm-eval has no task 'zzqxwv'; set include_path to the folder of your own tasks"),
        (asked(metric="accuracy"), "quiz has 0 metrics 'accuracy', and one is needed; it has acc; acc_norm"),
        (asked("both", "acc_norm"), "both has 0 metrics 'acc_norm', and one is needed; it has acc$"),
        (asked("finish", "exact_match"), "2 metrics .* it has exact_match,whole; exact_match,first-word"),
        (asked("easy_questions"), "easy_questions has no metric of its own; name its tasks: quiz"),
        (asked("arc_easy"), r"task arc_easy cannot be loaded \(.*\); data on the hub need the .*include_path"),
    ],
)
def test_task_that_cannot_be_measured_is_one_line(
    tmp_path: Path, tiny_policy: PolicyCheckpoint, settings: LmEval, message: str
) -> None:
    with pytest.raises(SelfalignError, match=message) as raised:
        measured(tmp_path, tiny_policy, settings)
    assert "\n" not in str(raised.value)


def test_missing_package_is_a_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SelfalignError, match=r"^benchmark.lm_eval: .*pip install 'selfalign\[lm-eval\]'$"):
        asked().sources("benchmark.lm_eval")


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("tasks=[]", "tasks"),
        ("tasks=[{name:a,metric:b},{name:a,metric:c}]", "tasks"),
        ("tasks=[{name:a,metric:b,num_fewshot:-1}]", "tasks"),
        ("limit=-1", "limit"),
        ("batch_size=0", "batch_size"),
    ],
)
def test_value_out_of_range_is_refused_with_its_key(setting: str, key: str) -> None:
    chosen = ["benchmark=[lm_eval]", "benchmark.lm_eval.tasks=[{name:a,metric:b}]", f"benchmark.lm_eval.{setting}"]
    with pytest.raises(SelfalignError, match=f"benchmark.lm_eval.{key}"):
        composed("experiment=smoke", *chosen)


def test_missing_folder_of_tasks_is_refused_with_its_key() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    with pytest.raises(SelfalignError, match=r"benchmark.lm_eval.include_path: no folder '/nowhere'"):
        asked(include_path="/nowhere").sources("benchmark.lm_eval")


def test_lm_eval_is_imported_when_it_measures_and_not_before() -> None:
    for path in (ROOT / "selfalign").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            text = ast.unparse(node) if isinstance(node, ast.Import | ast.ImportFrom) else ""
            assert path.name == "lm_eval_adapter.py" or not text.startswith(("from lm_eval", "import lm_eval")), path
            assert "lm_eval_adapter" not in text, path


# --- broken on purpose -------------------------------------------------------------------------------------------

WORKED_OUT = partial(test_accuracy_is_that_of_log_likelihoods_worked_out_by_hand, metric="acc_norm")
CUT_READ = partial(test_prompts_that_do_not_fit_are_counted, name="quiz", metric="acc", context=22)
CUT_WRITTEN = partial(test_prompts_that_do_not_fit_are_counted, name="finish", metric="exact_match,whole", context=28)
EXAMPLES = 'leaf.set_config(key="num_fewshot", value=examples or 0)'
RESTORED = "[answers[index] for index in range(len(requests))]"
CHAT = test_chat_template_wraps_the_prompt_only_when_asked
AMBIGUOUS = partial(
    test_task_that_cannot_be_measured_is_one_line, settings=asked("finish", "exact_match"), message="2 metrics"
)

# (what, old text, new text, the test that notices)
HARNESS_MUTANTS: list[tuple[str, str, str, Check]] = [
    ("answers stay in the order of the batches", RESTORED, "list(answers.values())", WORKED_OUT),
    ("batches share a name", '"{kind}/{task}/{start}"', '"{kind}/{task}"', WORKED_OUT),
    ("the first metric is taken", "if len(meant) != 1", "if not meant", AMBIGUOUS),
    ("examples as the task says", EXAMPLES, "pass", test_prompt_has_as_many_solved_examples_as_asked),
    ("a chat template always", "=settings.apply_chat_template", "=True", CHAT),
    ("other examples than lm-eval's", "set_fewshot_seed(seed=settings.seed)", "set_fewshot_seed(seed=1)",
     test_numbers_are_those_of_lm_eval_called_by_hand),
    ("cut prompts are not counted", "self._cut += sum(len(context)", "sum(len(context)", CUT_READ),
    ("those of written answers neither", "self._cut += sum(len(self", "sum(len(self", CUT_WRITTEN),
    ("a cut by one token", "> self.max_length + 1", "> self.max_length", CUT_READ),
    ("batches are not kept", "self.journal.batches(tasks)", "(work() for *_, work in tasks)",
     test_killed_measurement_goes_on_with_the_batch_in_flight),
]  # fmt: skip


@NEEDS_LM_EVAL
@pytest.mark.parametrize(
    ("what", "old", "new", "check"), HARNESS_MUTANTS, ids=[mutant[0] for mutant in HARNESS_MUTANTS]
)
def test_broken_harness_is_noticed(what: str, old: str, new: str, check: Check, given: dict[str, Any]) -> None:
    from selfalign.benchmarks import lm_eval_adapter

    assert_caught(lm_eval_adapter, lm_eval_adapter, old, new, check, given)


SETTINGS_MUTANTS: list[tuple[str, str, str, Check]] = [
    ("one standard error", "NORMAL_95 = 1.96", "NORMAL_95 = 1.0", WORKED_OUT),
    ("compiled files belong to the key", 'if "__pycache__" not in name', "if name",
     test_key_follows_the_users_files_and_not_what_running_them_leaves),
    ("data are no part of the key", "found |= {name", "{name",
     test_key_follows_the_users_files_and_not_what_running_them_leaves),
]  # fmt: skip


@NEEDS_LM_EVAL
@pytest.mark.parametrize(
    ("what", "old", "new", "check"), SETTINGS_MUTANTS, ids=[mutant[0] for mutant in SETTINGS_MUTANTS]
)
def test_broken_settings_are_noticed(what: str, old: str, new: str, check: Check, given: dict[str, Any]) -> None:
    assert_caught(lm_eval, sys.modules[__name__], old, new, check, given)
