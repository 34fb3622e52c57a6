"""engine=vllm without vLLM: the worker script runs for real, on a module that has vLLM's names but no model.

What vLLM itself writes is compared with transformers in `test_vllm.py`.
"""

import inspect
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    ROOT,
    instruction,
    policy_artifact,
    records_artifact,
    run,
    workspace,
    write_tiny_data,
)
from mutation import assert_caught

from selfalign.core.errors import SelfalignError
from selfalign.core.files import write_json
from selfalign.core.records import FinishReason
from selfalign.engines import vllm_engine
from selfalign.engines.protocol import Request, Sampling
from selfalign.engines.resident import workers_may_stay
from selfalign.engines.vllm_engine import VLLM, lora_arguments, share_gpus
from selfalign.models.batches import SharedPrompt
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import decode_response, stop_ids
from selfalign.stages.respond import RespondConfig, respond
from selfalign.store.artifacts import MANIFEST, Store

FAKE = ROOT / "tests" / "fake_vllm"
drawn, logp = itemgetter("drawn", "logp")(runpy.run_path(str(FAKE / "vllm" / "__init__.py")))
PATIENCE_SECONDS = 60
"""How long processes may take to end on a busy machine."""

WARM = Sampling(temperature=1.0, max_new_tokens=6)
REQUESTS = [Request(prompt=[5, 6, n], seeds=[n, n + 100]) for n in range(7)]


@pytest.fixture(autouse=True)
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """This interpreter has a vLLM."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE), str(ROOT)]))


@pytest.fixture
def report(tmp_path: Path) -> Iterator[Path]:
    """Where engines say what they were started with; none of their processes outlives a test that fails."""
    path = tmp_path / "report.jsonl"
    yield path
    for pid in pids(path):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def engine(report: Path, **changes: Any) -> VLLM:
    options = {"report": str(report), **changes.pop("options", {})}
    return VLLM(dtype="float32", options=options, **changes)


def reports(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pids(path: Path) -> list[int]:
    return [pid for seen in reports(path) for pid in seen["pids"]]


def is_running(pid: int) -> bool:
    """A process that has ended and that nobody has asked for yet does not count."""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def assert_gone(report: Path, count: int) -> None:
    """Of every engine, the process and its child."""
    known = pids(report)
    assert len(known) == 2 * count
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        if not any(map(is_running, known)):
            return
        time.sleep(0.1)
    pytest.fail(f"of {known} some still run")


# --- texts -------------------------------------------------------------------------------------------------------


def test_each_completion_is_that_of_its_prompt_and_seed(tiny_policy: PolicyCheckpoint, report: Path) -> None:
    with engine(report).load(tiny_policy) as generator:
        together = generator.generate(REQUESTS, WARM)
        alone = [generator.generate([request], WARM)[0] for request in reversed(REQUESTS)]
    assert together == alone[::-1]
    stops = stop_ids(generator.tokenizer)
    ids = [[drawn(request.prompt, seed, 6, stops) for seed in request.seeds] for request in REQUESTS]
    assert [[made.text for made in group] for group in together] == [
        [decode_response(generator.tokenizer, own) for own in group] for group in ids
    ]
    ended = [[made.finish_reason is FinishReason.EOS for made in group] for group in together]
    assert ended == [[own[-1] in stops for own in group] for group in ids]
    assert {end for group in ended for end in group} == {True, False}
    assert {made.tokens for group in together for made in group} == {6}


def test_ids_that_only_pad_the_embedding_are_never_drawn(tiny_policy: PolicyCheckpoint, report: Path) -> None:
    short = tiny_policy.load_tokenizer()
    with engine(report).load(tiny_policy) as generator:
        assert generator.silent == []
        generator.silent = list(range(100, len(short)))
        long = Sampling(temperature=1.0, max_new_tokens=200)
        stops = stop_ids(generator.tokenizer)
        made = {token for group in generator.generate(REQUESTS, long) for text in group for token in text.ids}
    assert max(made - {*stops}) < 100


def test_replicas_share_the_work_and_write_the_same(tiny_policy: PolicyCheckpoint, report: Path) -> None:
    with engine(report).load(tiny_policy) as generator:
        one = generator.generate(REQUESTS, WARM)
    with engine(report, replicas=3).load(tiny_policy) as generator:
        assert generator.generate(REQUESTS, WARM) == one
        assert generator.generate(REQUESTS[:1], WARM) == one[:1]
        assert len({seen["pids"][0] for seen in reports(report)}) == 4
    assert_gone(report, 4)


def test_greedy_texts_have_no_seed(tiny_policy: PolicyCheckpoint, report: Path) -> None:
    with engine(report).load(tiny_policy) as generator:
        [[one, other]] = generator.generate(REQUESTS[:1], Sampling(temperature=0, max_new_tokens=6))
    assert one == other


def test_log_probabilities_are_those_behind_each_response(tiny_policy: PolicyCheckpoint, report: Path) -> None:
    groups = [
        SharedPrompt(id="a", prompt=[5, 6], responses=[[], [7], [8, 9]], num_context_tokens=[0, 0, 0]),
        SharedPrompt(id="b", prompt=[9], responses=[[4]], num_context_tokens=[0]),
    ]
    with engine(report, replicas=2).load_scorer(tiny_policy, max_batch_tokens=1) as reader:
        rows = reader.next_token_logprobs(groups, [11, 12])
    behind = [[[5, 6], [5, 6, 7], [5, 6, 8, 9]], [[9, 4]]]
    assert rows == [[[logp(ids, 11), logp(ids, 12)] for ids in group] for group in behind]


def test_plans_keep_the_order_within_the_most_texts(tiny_policy: PolicyCheckpoint, report: Path) -> None:
    with engine(report, max_concurrent_completions=8).load(tiny_policy) as generator:
        assert generator.plan([9, 2, 7, 1, 3], samples=4, max_new_tokens=5) == [[0, 1], [2, 3], [4]]
        assert generator.plan([9, 2], samples=20, max_new_tokens=5) == [[0], [1]]
    groups = [
        SharedPrompt(id=str(n), prompt=[5], responses=[[6]] * n, num_context_tokens=[0] * n) for n in (3, 5, 1, 9, 2)
    ]
    with engine(report, max_concurrent_completions=8).load_scorer(tiny_policy, max_batch_tokens=1) as reader:
        assert [[group.id for group in batch] for batch in reader.plan(groups)] == [["3", "5"], ["1"], ["9"], ["2"]]


def test_context_is_the_models_own_or_a_shorter_one(tiny_policy: PolicyCheckpoint, report: Path) -> None:
    for asked, given in ((0, 2048), (512, 512), (1 << 20, 2048)):
        with engine(report, max_model_len=asked).load(tiny_policy) as generator:
            assert generator.context == given
        assert reports(report)[-1]["arguments"]["max_model_len"] == given


# --- processes ---------------------------------------------------------------------------------------------------


def test_engine_is_gone_when_the_work_is_done_and_has_said_its_version(
    tiny_policy: PolicyCheckpoint, report: Path
) -> None:
    with engine(report).load(tiny_policy) as generator:
        generator.generate(REQUESTS, WARM)
        assert all(map(is_running, pids(report)))
    assert_gone(report, 1)
    assert generator.counts == {"vllm_version": "0.0.0"}


@pytest.mark.parametrize("error", [SelfalignError, KeyboardInterrupt])
def test_engine_is_gone_after_an_error_of_ours(
    tiny_policy: PolicyCheckpoint, report: Path, error: type[BaseException]
) -> None:
    def work() -> None:
        with engine(report, options={"hangs_at": 1}).load(tiny_policy) as generator:
            generator.workers[0].send({"prompts": [[5]], "seeds": [[1]], "sampling": {}})
            raise error

    with pytest.raises(error):
        work()
    assert_gone(report, 1)


@pytest.mark.parametrize("hangs_at", [-1, 0, 1], ids=["idle", "starting", "writing"])
def test_engine_is_gone_when_the_run_is_killed(report: Path, hangs_at: int) -> None:
    settings = {"gpus": "", "adapter": "", "arguments": {"report": str(report), "hangs_at": hangs_at}}
    question = {"prompts": [[5]], "seeds": [[1]], "sampling": {"temperature": 1.0, "max_tokens": 4}}
    code = (
        "import sys, time\nfrom selfalign.engines.worker_process import Worker\n"
        f"worker = Worker('engine', [sys.executable, '-P', {str(vllm_engine.WORKER)!r}])\n"
        f"worker.send({settings})\nworker.receive()\nworker.send({question})\nworker.receive()\n"
        "print('idle', flush=True)\ntime.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    if hangs_at < 0:
        assert parent.stdout.readline() == b"idle\n"
    while not reports(report) and parent.poll() is None:
        time.sleep(0.02)
    parent.kill()
    parent.communicate()
    assert_gone(report, 1)


def test_engine_that_cannot_start_is_told_in_one_line(tiny_policy: PolicyCheckpoint, report: Path) -> None:
    with pytest.raises(SelfalignError) as failed:
        engine(report, replicas=2, options={"fails_at": 0}).load(tiny_policy)
    assert (
        str(failed.value)
        == "the engine of engine=vllm ended with exit code 1: RuntimeError: no memory is left at question 0"
    )
    assert_gone(report, len(reports(report)))


def test_interpreter_that_is_not_there_or_has_no_vllm_is_named(
    tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SelfalignError, match=r"/nowhere/python cannot be run \(No such file or directory\)"):
        VLLM(python="/nowhere/python").load(tiny_policy)
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(SelfalignError, match=r"exit code 1: ModuleNotFoundError: No module named 'vllm'"):
        VLLM().load(tiny_policy)


def test_what_an_engine_said_before_it_failed_is_logged(
    tiny_policy: PolicyCheckpoint, report: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SelfalignError):
        engine(report, options={"fails_at": 0}).load(tiny_policy)
    assert "does not disturb" in caplog.text
    assert "RuntimeError: no memory is left" in caplog.text


def test_stage_continues_behind_the_batch_at_which_an_engine_failed(
    tiny_policy: PolicyCheckpoint, tmp_path: Path, report: Path
) -> None:
    given = records_artifact(tmp_path / "given", instructions=[instruction(name) for name in ("bees", "tea", "maps")])
    settings: dict[str, Any] = {
        "config": RespondConfig(candidates=2, sampling=WARM),
        "policy": policy_artifact(tiny_policy),
        "instructions": given,
        "seed": 1,
    }
    whole, killed = workspace(tmp_path / "whole"), workspace(tmp_path / "killed")
    respond(whole, engine=engine(report, max_concurrent_completions=2), **settings)
    with pytest.raises(SelfalignError, match=r"exit code 1: RuntimeError: no memory is left at question 2"):
        respond(killed, engine=engine(report, max_concurrent_completions=2, options={"fails_at": 2}), **settings)
    # Two batches are left, so it does not come to a third question.
    counts = respond(killed, engine=engine(report, max_concurrent_completions=2, options={"fails_at": 3}), **settings)
    assert (killed.path / "responses.jsonl").read_bytes() == (whole.path / "responses.jsonl").read_bytes()
    assert counts["vllm_version"] == "0.0.0"
    assert_gone(report, 3)


# --- resident engines --------------------------------------------------------------------------------------------


def policy_like(policy: PolicyCheckpoint, folder: Path, adapter: int = 0, **weights: str) -> PolicyCheckpoint:
    """A policy in another folder, with other digests, and with an adapter of this rank."""
    shutil.copytree(policy.path, folder, symlinks=True)
    write_json(folder / "weights.json", {**policy.weights, **weights})
    if adapter:
        (folder / "adapter").mkdir()
        write_json(folder / "adapter" / "adapter_config.json", {"r": adapter})
    return PolicyCheckpoint(folder)


def told(report: Path) -> list[Any]:
    """Everything that engines were told after they had started."""
    return [json.loads(line) for line in Path(f"{report}.calls").read_text().splitlines()]


def written(report: Path, policy: PolicyCheckpoint, **settings: Any) -> Any:
    with engine(report, resident=True, **settings).load(policy) as generator:
        return generator.generate(REQUESTS, WARM)


def test_resident_engine_takes_the_next_weights_and_ends_with_the_run(
    tiny_policy: PolicyCheckpoint, tmp_path: Path, report: Path
) -> None:
    after = policy_like(tiny_policy, tmp_path / "after", **{"model.safetensors": "other"})
    groups = [SharedPrompt(id="a", prompt=[5, 6], responses=[[7]], num_context_tokens=[0])]
    with engine(report).load(tiny_policy) as generator:
        fresh = generator.generate(REQUESTS, WARM)
    with workers_may_stay():
        assert written(report, tiny_policy) == fresh
        assert written(report, after) == fresh
        with engine(report, resident=True).load_scorer(after, max_batch_tokens=1) as reader:
            assert reader.next_token_logprobs(groups, [11]) == [[[logp([5, 6, 7], 11)]]]
        assert len(reports(report)) == 2
        assert all(map(is_running, reports(report)[1]["pids"]))
        assert reader.counts == {"vllm_version": "0.0.0"}
    assert_gone(report, 2)
    renewed = [
        ["reload_weights", {"weights_path": str(after.path / "weights")}],
        ["apply_model", "renew_output_layer"],
        ["reset_prefix_cache", None],
    ]
    wrote = ["generate", None]
    assert told(report) == [wrote, wrote, *renewed, wrote, *renewed, wrote]


def test_resident_engine_takes_the_next_adapter_beside_the_same_base(
    tiny_policy: PolicyCheckpoint, tmp_path: Path, report: Path
) -> None:
    one, two, wider, other = (
        policy_like(tiny_policy, tmp_path / name, rank, base=base)
        for name, rank, base in (("one", 4, "b"), ("two", 8, "b"), ("wider", 9, "b"), ("other", 9, "c"))
    )
    with workers_may_stay():
        written(report, one)
        written(report, two)
        assert len(reports(report)) == 1
        assert told(report)[-2:] == [["reset_prefix_cache", None], ["generate", [2, str(two.path / "adapter")]]]
        assert "reload_weights" not in dict(told(report))
        for number, needs_its_own in enumerate((wider, other, tiny_policy), start=2):
            written(report, needs_its_own)
            assert len(reports(report)) == number
    assert_gone(report, 4)


def test_resident_engine_is_not_taken_for_another_shape_or_with_other_settings(
    tiny_policy: PolicyCheckpoint, tmp_path: Path, report: Path
) -> None:
    other = policy_like(tiny_policy, tmp_path / "other", **{"config.json": "other"})
    with workers_may_stay():
        written(report, tiny_policy)
        written(report, other)
        assert not any(map(is_running, reports(report)[0]["pids"]))
        written(report, other, replicas=2)
        assert len(reports(report)) == 4
        written(report, other, replicas=2)
        assert len(reports(report)) == 4
    assert_gone(report, 4)


def test_resident_engine_leaves_the_gpu_between_stages(
    tiny_policy: PolicyCheckpoint, tmp_path: Path, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = policy_like(tiny_policy, tmp_path / "adapted", 8, base="b")
    monkeypatch.setattr(vllm_engine, "share_gpus", lambda replicas, each: ["0"])
    with workers_may_stay():
        for policy in (tiny_policy, tiny_policy, adapted, adapted):
            written(report, policy)
    wrote, weights = ["generate", None], {"weights_path": str(tiny_policy.path / "weights")}
    adapters = [["generate", [n, str(adapted.path / "adapter")]] for n in (1, 2)]
    woken = [["wake_up", ["weights"]], ["wake_up", ["kv_cache"]], ["reset_prefix_cache", None]]
    renewed = [woken[0], ["reload_weights", weights], *woken[1:]]
    plain = [wrote, ["sleep", 2], *renewed, wrote, ["sleep", 2]]
    assert told(report) == [*plain, adapters[0], ["sleep", 1], *woken, adapters[1], ["sleep", 1]]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for resident in (True, False):
        assert engine(report, resident=resident).arguments(tiny_policy)["enable_sleep_mode"] is resident


def test_engine_that_ended_between_two_stages_is_started_anew(
    tiny_policy: PolicyCheckpoint, report: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with workers_may_stay():
        before = written(report, tiny_policy)
        os.kill(reports(report)[0]["pids"][0], signal.SIGKILL)
        assert written(report, tiny_policy) == before
    assert re.search(r"ended with exit code -9: .*\. Whoever needs it next starts it anew", caplog.text)
    assert_gone(report, 2)


def test_engine_that_cannot_take_weights_is_started_anew(
    tiny_policy: PolicyCheckpoint, report: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with workers_may_stay():
        before = written(report, tiny_policy, options={"blocks_in_use": True})
        assert written(report, tiny_policy, options={"blocks_in_use": True}) == before
    assert "vLLM did not let go of its cache of prompts" in caplog.text
    assert_gone(report, 2)


@pytest.mark.parametrize("error", [None, SelfalignError, KeyboardInterrupt])
def test_busy_engine_does_not_stay(
    tiny_policy: PolicyCheckpoint, report: Path, error: type[BaseException] | None
) -> None:
    """Its answer would be taken for that to the next question. A judge leaves its engine without the error."""
    with workers_may_stay():
        with suppress(SelfalignError, KeyboardInterrupt), engine(report, resident=True).load(tiny_policy) as generator:
            generator.workers[0].send(
                {"prompts": [[5]], "seeds": [[1]], "sampling": {"temperature": 1, "max_tokens": 4}}
            )
            if error:
                raise error
        assert_gone(report, 1)
        written(report, tiny_policy)
    assert_gone(report, 2)


def test_no_engine_stays_outside_a_run(tiny_policy: PolicyCheckpoint, report: Path) -> None:
    written(report, tiny_policy)
    assert_gone(report, 1)


# --- what an engine is started with ------------------------------------------------------------------------------


def test_engine_gets_the_weights_and_what_was_set(tiny_policy: PolicyCheckpoint, report: Path) -> None:
    settings = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5, "options": {"enforce_eager": True}}
    with engine(report, **settings).load(tiny_policy):
        pass
    arguments = reports(report)[0]["arguments"]
    expected = {
        "model": str(tiny_policy.path / "weights"),
        "dtype": "float32",
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.5,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 4096,
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "enforce_eager": True,
    }
    assert {name: arguments.get(name) for name in expected} == expected
    assert "enable_lora" not in arguments


def test_engine_is_no_process_of_the_run(
    tiny_policy: PolicyCheckpoint, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    with engine(report).load(tiny_policy):
        pass
    environment = reports(report)[0]["environment"]
    assert not [name for name in environment if "RANK" in name or "MASTER" in name or "TORCHELASTIC" in name]
    assert environment["VLLM_NO_USAGE_STATS"] == "1"


def test_gpus_are_shared_among_replicas_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert share_gpus(2, 4) == ["", ""]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert share_gpus(2, 4) == ["0,1,2,3", "4,5,6,7"]
    assert share_gpus(3, 1) == ["0", "1", "2"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert share_gpus(2, 2) == ["4,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,3")
    assert share_gpus(1, 1) == ["GPU-b"]
    with pytest.raises(SelfalignError, match=r"engine\.replicas=2 × engine\.tensor_parallel_size=1 need 2 GPUs"):
        share_gpus(2, 1)


@pytest.mark.parametrize(("rank", "room"), [(1, 8), (8, 8), (9, 16), (512, 512), (513, None)])
def test_adapter_gets_the_smallest_room_that_it_fits_into(tmp_path: Path, rank: int, room: int | None) -> None:
    write_json(tmp_path / "adapter_config.json", {"r": rank})
    if room is None:
        with pytest.raises(SelfalignError, match=r"up to rank 512, but model\.lora\.rank=513"):
            lora_arguments(tmp_path)
    else:
        assert lora_arguments(tmp_path) == {"enable_lora": True, "max_lora_rank": room}


# --- a whole run -------------------------------------------------------------------------------------------------


def test_whole_run_writes_and_judges_with_the_engine_and_says_so(tmp_path: Path, report: Path) -> None:
    overrides = [
        *("experiment=smoke", "name=tiny", "iterations=1", "engine=vllm", "engine.dtype=float32"),
        *("data.instruct.count=3", "data.instruct.min_words=1", "data.instruct.prompts_per_batch=4"),
        f"+engine.options.report={report}",
        *write_tiny_data(tmp_path / "data"),
    ]
    folder = run(tmp_path / "outputs", *overrides)
    summary = json.loads((folder / "summary.json").read_text())
    counts = {stage["label"]: stage["counts"] for stage in summary["stages"]}
    worked = [name for name, said in counts.items() if said.get("vllm_version") == "0.0.0"]
    assert {"iteration_1/instructions", "iteration_1/responses", "iteration_1/judgements"} <= set(worked)
    assert {"evaluation_M2/answers", "evaluation_M2/scores"} <= set(worked)
    manifest = json.loads((folder / "artifacts" / "iteration_1" / "responses" / MANIFEST).read_text())
    assert manifest["inputs"]["engine"]["class"] == "VLLM"
    assert_gone(report, len(worked))
    stayed = run(tmp_path / "resident", *overrides, "engine.resident=true")
    assert_gone(report, len(worked) + 1)
    again = {stage["label"]: stage for stage in json.loads((stayed / "summary.json").read_text())["stages"]}
    for stage in summary["stages"]:
        assert (stage["key"], stage["counts"]) == (again[stage["label"]]["key"], again[stage["label"]]["counts"])


def test_texts_of_two_engines_are_two_artifacts_and_of_more_gpus_the_same() -> None:
    store = Store(Path("store"))
    one = store.path_of("respond", {"engine": VLLM(dtype="float32")})
    assert one == store.path_of("respond", {"engine": VLLM(dtype="float32", replicas=4, python="/other/python")})
    assert one != store.path_of("respond", {"engine": vllm_engine.VLLM(dtype="bfloat16")})


# --- broken on purpose -------------------------------------------------------------------------------------------

ENGINE = [
    (
        "the other replica's texts",
        "index % len(answers)",
        "-index % len(answers)",
        test_replicas_share_the_work_and_write_the_same,
    ),
    ("every text ended", "if ids and ids[-1] in stops", "if ids", test_each_completion_is_that_of_its_prompt_and_seed),
    (
        "read behind the prompt",
        "prompt=[*group.prompt, *response]",
        "prompt=group.prompt",
        test_log_probabilities_are_those_behind_each_response,
    ),
    (
        "the longer context",
        "min(self.max_model_len",
        "max(self.max_model_len",
        test_context_is_the_models_own_or_a_shorter_one,
    ),
    (
        "all processes on the same GPUs",
        'int(os.environ.get("LOCAL_RANK", "0"))',
        "0",
        test_gpus_are_shared_among_replicas_and_processes,
    ),
]
SCRIPT = [
    (
        "one seed for all",
        "seed=seed, detokenize",
        "seed=0, detokenize",
        test_each_completion_is_that_of_its_prompt_and_seed,
    ),
    ("prints among the answers", "os.dup2(2, 1)", "pass", test_greedy_texts_have_no_seed),
    (
        "children left behind",
        "os.killpg(0, signal.SIGKILL)",
        "pass",
        test_engine_is_gone_when_the_run_is_killed,
    ),
    (
        "prompts of other weights",
        "if not self._model.reset_prefix_cache()",
        "if False",
        test_resident_engine_takes_the_next_weights_and_ends_with_the_run,
    ),
    (
        "the adapter before",
        "self._adapters += 1",
        "self._adapters = 1",
        test_resident_engine_takes_the_next_adapter_beside_the_same_base,
    ),
    ("the run's processes known", "if name in RUN or", "if", test_engine_is_no_process_of_the_run),
]


@pytest.mark.parametrize(("old", "new", "check"), [m[1:] for m in ENGINE], ids=[m[0] for m in ENGINE])
def test_mutant_of_the_engine_is_caught(old: str, new: str, check: Any, given: dict[str, Any], report: Path) -> None:
    assert_caught(
        vllm_engine, sys.modules[__name__], old, new, check, {**given, "report": report}, WORKER=vllm_engine.WORKER
    )


@pytest.mark.parametrize(("old", "new", "check"), [m[1:] for m in SCRIPT], ids=[m[0] for m in SCRIPT])
def test_mutant_of_the_script_is_caught(
    old: str,
    new: str,
    check: Any,
    tmp_path: Path,
    tiny_policy: PolicyCheckpoint,
    report: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = vllm_engine.WORKER.read_text(encoding="utf-8")
    assert source.count(old) == 1
    (tmp_path / "broken.py").write_text(source.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(vllm_engine, "WORKER", tmp_path / "broken.py")
    monkeypatch.setattr(sys.modules[__name__], "PATIENCE_SECONDS", 3)
    known = {"tiny_policy": tiny_policy, "report": report, "monkeypatch": monkeypatch, "hangs_at": -1}
    known["tmp_path"] = tmp_path / "own"
    with pytest.raises((AssertionError, pytest.fail.Exception, SelfalignError)):
        check(**{name: known[name] for name in inspect.signature(check).parameters})
