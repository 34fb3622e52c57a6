"""Writing through a server: against a local one that fails in every way, and against real ones that are started."""

import json
import logging
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    RUBRIC,
    TINY_RUN,
    instruction,
    nudged_policy,
    policy_artifact,
    records_artifact,
    run,
    taught_policy,
    weights,
    workspace,
    write_tiny_data,
)
from chat_server import ChatServer, Fault, chat_server, continuation
from judging import ANSWERS, ASKED
from mutation import assert_caught
from transformers.utils.import_utils import is_serve_available

from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import read_records
from selfalign.core.records import FinishReason, Response
from selfalign.data.turns import as_prompt
from selfalign.engines import server as engine
from selfalign.engines.protocol import Completion, Request, Sampling
from selfalign.engines.server import Server, ServerGenerator, export
from selfalign.engines.transformers import Transformers
from selfalign.judges.external import ExternalScore
from selfalign.judges.protocol import InstructionResponse, JudgeContext
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt
from selfalign.stages.respond import RespondConfig, respond
from selfalign.store.journal import Journal
from selfalign.store.key import to_key_json
from selfalign.training.prepare import prepare

KEY = f"sk-{secrets.token_hex(16)}"
IDLE = "echo started {weights} {port}; exec sleep 600"
"""A command whose server is another one: the test's own, in this process."""
WARM = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=8)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRITER_KEY", KEY)
    monkeypatch.setattr("selfalign.engines.openai_client.pause", lambda stop, seconds: None)
    monkeypatch.setattr(engine, "POLL_SECONDS", 0.01)


def counted(body: dict[str, Any]) -> bytes:
    """A text that names its seed, by a server that takes token ids."""
    return continuation(f" Text {body.get('seed')}. ", len(body["prompt"]))


def port_of(server: ChatServer) -> int:
    return int(server.url.removesuffix("/v1").rsplit(":", 1)[1])


@contextmanager
def served(
    policy: PolicyCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    says: Callable[[dict[str, Any]], bytes] = counted,
    faults: Sequence[Fault | None] = (),
    **settings: Any,
) -> Iterator[tuple[ServerGenerator, ChatServer]]:
    """The policy as it writes through the test's own server; the first of the faults meets it as it is started."""
    with chat_server(says, faults) as server:
        monkeypatch.setattr(sys.modules[Server.__module__], "_free_port", lambda: port_of(server))
        with Server(**{"command": IDLE, "dtype": "float32", **settings}).load(policy) as generator:
            server.bodies.clear()
            yield generator, server


def asking(policy: PolicyCheckpoint, *questions: str, seeds: int = 1) -> list[Request]:
    tokenizer = policy.load_tokenizer()
    prompts = [encode_prompt(tokenizer, as_prompt(question)) for question in questions]
    return [Request(prompt=p, seeds=[100 * n + s for s in range(seeds)]) for n, p in enumerate(prompts)]


# --- what is asked, and what is made of the answers ----------------------------------------------------------------


def without_ids(written: list[list[Completion]]) -> list[list[Completion]]:
    """As a server gives completions, which tells texts alone."""
    return [[replace(one, ids=[]) for one in group] for group in written]


def test_token_ids_and_seeds_are_sent_and_completions_come_back_in_order(
    tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = asking(tiny_policy, "Why?", "Where do the bees go?", seeds=3)
    with served(tiny_policy, monkeypatch, api_key_env="WRITER_KEY") as (generator, server):
        written = generator.generate(requests, WARM)
        assert generator.context == 2048
        assert generator.digest == tiny_policy.digest
    assert [[c.text for c in group] for group in written] == [[f" Text {s}. " for s in r.seeds] for r in requests]
    assert {(c.finish_reason, c.tokens) for group in written for c in group} == {(FinishReason.EOS, 3)}
    sent = {body["seed"]: body for body in server.bodies}
    assert {seed: body["prompt"] for seed, body in sent.items()} == {s: r.prompt for r in requests for s in r.seeds}
    assert {(b["temperature"], b["top_p"], b["max_tokens"]) for b in sent.values()} == {(0.7, 0.9, 8)}
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert len({body["model"] for body in server.bodies}) == 1


def test_text_that_was_cut_says_so(tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = lambda body: continuation("And so", len(body["prompt"]), "length")  # noqa: E731
    with served(tiny_policy, monkeypatch, cut) as (generator, _):
        [[made]] = generator.generate(asking(tiny_policy, "Why?"), WARM)
    assert (made.text, made.finish_reason) == ("And so", FinishReason.LENGTH)


def test_server_that_takes_texts_alone_is_sent_texts(
    tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_policy.load_tokenizer()

    def texts_alone(body: dict[str, Any]) -> bytes:
        assert isinstance(body["prompt"], str)
        return continuation("Fine.", len(tokenizer(body["prompt"])["input_ids"]))

    refusal = Fault(400, b'{"detail": "prompt must be a string."}')
    with served(tiny_policy, monkeypatch, texts_alone, [refusal]) as (generator, server):
        [request] = asking(tiny_policy, "Where do the bees go?")
        assert generator.generate([request], WARM)[0][0].text == "Fine."
        assert tokenizer(server.bodies[0]["prompt"])["input_ids"] == request.prompt
        control = Request(prompt=tokenizer("Is <|im_end|> an end?", split_special_tokens=True)["input_ids"], seeds=[0])
        with pytest.raises(
            SelfalignError, match=r"prompts as text only, and it cannot convert \d+ prompt tokens .*vLLM or SGLang"
        ):
            generator.generate([control], WARM)


WRONG = {
    "other_tokenizer": (lambda body: continuation("Fine.", len(body["prompt"]) + 1), "the server reports"),
    "no_usage": (
        lambda body: b'{"choices": [{"text": "Fine.", "finish_reason": "stop"}]}',
        "the server reports 0 prompt tokens",
    ),
    "unknown_length": (
        lambda body: continuation("Fine.", len(body["prompt"])).replace(b"completion_tokens", b"written"),
        "does not say how many tokens it wrote",
    ),
    "unknown_end": (lambda body: continuation("", len(body["prompt"]), "repetition"), "for the reason 'repetition'"),
    "filtered": (lambda body: continuation("", len(body["prompt"]), "SAFETY"), "for the reason 'content_filter'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_answer_that_cannot_be_the_policys_is_an_error(
    name: str, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    says, message = WRONG[name]
    with served(tiny_policy, monkeypatch, says) as (generator, _), pytest.raises(SelfalignError, match=message):
        generator.generate(asking(tiny_policy, "Why?"), WARM)


@pytest.mark.parametrize("message", ["context_length_exceeded", "This model's maximum context length is 16 tokens."])
def test_context_that_is_too_small_is_named(
    message: str, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = Fault(400, json.dumps({"error": {"message": message}}).encode())
    refused = pytest.raises(SelfalignError, match=r"engine\.command: the server rejected a \d+-token prompt")
    with served(tiny_policy, monkeypatch, faults=[None, refusal]) as (generator, _), refused:
        generator.generate(asking(tiny_policy, "Why?"), WARM)


def test_passing_faults_are_asked_again(tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [
        Fault(429, headers={"Retry-After": "1"}), Fault(500), Fault(503), Fault(body=b'{"choices": [{"te'),
        Fault(body=b'{"choices": [{}]}'), Fault(body=b"<html>"), Fault(hangs=True), Fault(resets=True),
        Fault(body=continuation("And so", 1, "abort")),
    ]  # fmt: skip
    settings = {"timeout_seconds": 1.0, "concurrency": 2, "retries": 8}
    requests = asking(tiny_policy, "Why?", seeds=4)
    with served(tiny_policy, monkeypatch, faults=[None, *faults], **settings) as (generator, server):
        written = generator.generate(requests, WARM)
        assert len(server.bodies) == 4 + len(faults)
        assert server.most_at_once <= 3  # One that is given up is under way at the server still.
    assert [c.text for c in written[0]] == [" Text 0. ", " Text 1. ", " Text 2. ", " Text 3. "]


def test_server_that_fails_for_good_is_an_error_and_others_are_given_up(
    tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [None, *[Fault(500)] * 99]
    with served(tiny_policy, monkeypatch, faults=faults, retries=1, concurrency=1) as (generator, server):
        with pytest.raises(SelfalignError, match="no usable answer in 2 tries, at last: status 500"):
            generator.generate(asking(tiny_policy, "Why?", seeds=9), WARM)
        assert len(server.bodies) <= 4


def test_failure_does_not_wait_for_what_is_under_way(
    tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [None, Fault(hangs=True), Fault(403)]
    with served(tiny_policy, monkeypatch, faults=faults, concurrency=2) as (generator, server):
        with pytest.raises(SelfalignError, match="status 403"):
            generator.generate(asking(tiny_policy, "Why?", seeds=2), WARM)
        assert server.at_once


def test_batches_are_made_of_the_prompts_alone(tiny_policy: PolicyCheckpoint) -> None:
    plan = Server(command=IDLE, max_concurrent_completions=8, concurrency=3).load(tiny_policy).plan
    assert plan([5, 900, 7], 4, 64) == [[0, 1], [2]]
    assert plan([5, 900], 99, 64) == [[0], [1]]
    assert plan([], 4, 64) == []
    keys = [to_key_json(Server(command=IDLE, concurrency=n, api_key_env="K" * n, retries=n)) for n in (1, 2)]
    assert keys[0] == keys[1]
    assert to_key_json(Server(command=IDLE, max_concurrent_completions=7)) != keys[0]


# --- what a server is given ----------------------------------------------------------------------------------------


def test_exported_policy_stops_and_samples_as_ours_and_its_source_stays(
    tiny_policy: PolicyCheckpoint, tmp_path: Path
) -> None:
    own = nudged_policy(tiny_policy, tmp_path / "own")
    tokenizer = own.load_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(own.path / "tokenizer")
    (own.path / "weights" / "tokenizer_config.json").write_text('{"chat_template": "of the hub"}')
    before = {p: p.read_bytes() for p in own.path.rglob("*") if p.is_file()}
    (tmp_path / "out").mkdir()
    export(own, tmp_path / "out", "float32")
    assert {p: p.read_bytes() for p in own.path.rglob("*") if p.is_file()} == before
    assert (tmp_path / "out" / "model.safetensors").is_symlink()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    served, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), own.load("float32", device="cpu").model
    assert all(torch.equal(a, b) for a, b in zip(served.parameters(), ours.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    how = served.generation_config
    assert (how.do_sample, how.top_k, how.eos_token_id, how.pad_token_id) == (True, len(tokenizer), [2], 0)
    assert (how.temperature, how.top_p, how.repetition_penalty) == (1.0, 1.0, 1.0)


def test_adapter_is_merged_into_what_is_served(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> None:
    adapted = PolicyCheckpoint(tmp_path / "adapted")
    policy = adapt(tiny_policy)
    adapted.path.mkdir()
    adapted.save(policy, tiny_policy)
    (tmp_path / "out").mkdir()
    export(adapted, tmp_path / "out", "float32")
    from transformers import AutoModelForCausalLM

    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[5, 9, 12, 40]])
    with torch.inference_mode():
        logits, plain = served(ids).logits, tiny_policy.load("float32", device="cpu").model(ids).logits
        torch.testing.assert_close(logits, adapted.load("float32", device="cpu").model(ids).logits)
    assert not torch.allclose(logits, plain, atol=1e-3)


def test_weights_that_are_served_are_rounded_once_when_the_adapter_is_in_them(
    tiny_policy: PolicyCheckpoint, tmp_path: Path
) -> None:
    adapted = PolicyCheckpoint(tmp_path / "adapted")
    adapted.path.mkdir()
    adapted.save(adapt(tiny_policy), tiny_policy)
    (tmp_path / "out").mkdir()
    export(adapted, tmp_path / "out", "bfloat16")
    from transformers import AutoModelForCausalLM

    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    merged = adapted.load("float32", device="cpu").model
    for ours, theirs in zip(merged.parameters(), served.parameters(), strict=True):
        assert torch.equal(ours.bfloat16(), theirs)


def adapt(policy: PolicyCheckpoint) -> Any:
    """The policy with an adapter that changes what it says."""
    loaded = policy.load("float32", device="cpu")
    prepare(loaded, policy, weights(rank=4), 0.0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=draw)
    return loaded


# --- the server's life ---------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][:3]
    except FileNotFoundError:
        return False


def gone(pid: int, seconds: float = 30) -> bool:
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


def noting(folder: Path) -> str:
    """A command that notes its process, that of a child of its own and its weights, and then idles."""
    note = f"echo $$ $! {{weights}} > {folder}/note.part; mv {folder}/note.part {folder}/note"
    return f": {{port}}; sleep 600 & {note}; wait"


def noted(place: Path) -> tuple[int, int, Path]:
    until = time.monotonic() + 120
    while not (place / "note").exists() and time.monotonic() < until:
        time.sleep(0.02)
    shell, child, folder = (place / "note").read_text().split()
    return int(shell), int(child), Path(folder)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_of_a_server(
    fails: bool, tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        try:
            with served(tiny_policy, monkeypatch, command=noting(tmp_path)) as (generator, _):
                stack.callback(generator._server.stop)  # A broken copy leaves it to this test.
                shell, child, folder = noted(tmp_path)
                assert alive(shell)
                assert alive(child)
                assert (folder / "config.json").exists()
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        assert gone(shell, 0)
        assert gone(child, 0)
        assert not folder.exists()


def test_server_that_does_not_want_to_end_is_killed(
    tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("selfalign.engines.server_process.TERMINATE_TIMEOUT", 0.3)
    with served(tiny_policy, monkeypatch, command="trap '' TERM; " + noting(tmp_path)):
        shell, child, _ = noted(tmp_path)
    assert gone(shell)
    assert gone(child)


def test_server_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from selfalign.engines.server_process import ServerProcess\n"
        "server = ServerProcess(sys.argv[1], Path(sys.argv[2]), str); time.sleep(600)"
    )
    (weights := tmp_path / "weights").mkdir()
    command = noting(tmp_path).replace("{weights}", str(weights))
    with subprocess.Popen([sys.executable, "-c", script, command, str(weights)]) as run:
        shell, child, _ = noted(tmp_path)
        assert alive(shell)
        run.send_signal(signal.SIGKILL)
    assert gone(shell)
    assert gone(child)
    until = time.monotonic() + 30
    while weights.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not weights.exists()


def test_server_that_does_not_start_tells_why_without_the_key(tiny_policy: PolicyCheckpoint) -> None:
    command = f"echo loading; echo 'no memory, {KEY}' >&2; exit 3 # {{weights}} {{port}}"
    generator = Server(command=command, api_key_env="WRITER_KEY").load(tiny_policy)
    with pytest.raises(SelfalignError, match=r"has ended; its output: loading / no memory, \[key\]$"), generator:
        pass


def test_server_that_refuses_the_key_is_not_taken_for_another_kind(
    tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = pytest.raises(SelfalignError, match="status 401")
    with refused, served(tiny_policy, monkeypatch, faults=[Fault(401)]):
        pass


def test_server_that_takes_too_long_to_start_is_stopped(tiny_policy: PolicyCheckpoint, tmp_path: Path) -> None:
    generator = Server(command="echo loading; " + noting(tmp_path), startup_timeout_seconds=0.5).load(tiny_policy)
    message = r"no answer in engine\.startup_timeout_seconds=0\.5 \(ConnectError\); the server's output: loading"
    with pytest.raises(SelfalignError, match=message), generator:
        pass
    assert gone(noted(tmp_path)[0])


def test_server_that_ends_while_it_is_asked_tells_why(
    tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = f": {{weights}} {{port}}; while [ ! -e {tmp_path}/end ]; do sleep 0.02; done; echo out of memory; exit 1"
    with served(tiny_policy, monkeypatch, command=command, retries=0, faults=[None, Fault(500)]) as (generator, _):
        (tmp_path / "end").touch()
        server = generator._server
        assert server is not None
        until = time.monotonic() + 30
        while not server.ended and time.monotonic() < until:
            time.sleep(0.02)
        with pytest.raises(SelfalignError, match=r"status 500.*the server has ended; its output: out of memory"):
            generator.generate(asking(tiny_policy, "Why?"), WARM)


def test_launchers_variables_are_kept_from_the_server(
    tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "0")
    command = f"env > {tmp_path}/env; " + noting(tmp_path)
    with served(tiny_policy, monkeypatch, command=command):
        noted(tmp_path)
    seen = {line.split("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert "WRITER_KEY" in seen
    assert not seen & {"RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"}


def test_other_processes_of_a_run_start_none_and_ask_the_main_ones(
    tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(distributed, "broadcast", lambda value: told.append(value) or value)
    requests = asking(tiny_policy, "Why?", "Where?")
    with served(tiny_policy, monkeypatch) as (generator, server):
        monkeypatch.setattr(distributed, "is_main", lambda: False)
        monkeypatch.setattr(distributed, "broadcast", lambda value: told[0])
        monkeypatch.setattr(engine, "ServerProcess", None)
        with Server(command=IDLE, dtype="float32").load(tiny_policy) as other:
            assert other.generate(requests, WARM) == generator.generate(requests, WARM)
        assert len(server.bodies) == 4


def test_other_machines_of_a_run_ask_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine._host() == "localhost"
    monkeypatch.setenv("MASTER_ADDR", "node-0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert engine._host() == "localhost"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert engine._host() == "node-0"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"command": "vllm serve {weights}"}, r"command lacks \{port\}"),
        (
            {"command": "vllm serve {weights} --port {port} --name {model}"},
            r"command: unknown placeholder \{model\}; allowed: \{weights",
        ),
        ({"command": "vllm serve --port {port}"}, r"command lacks \{weights\}"),
        ({"command": f"{IDLE} --api-key sk-0123"}, "command contains a key, and it is saved with the run"),
        ({"command": f"{IDLE} --api-key=sk-0123"}, "command contains a key, and it is saved with the run"),
        ({"dtype": "float8"}, "dtype"),
        ({"max_concurrent_completions": 0}, "max_concurrent_completions"),
        ({"startup_timeout_seconds": 0}, "startup_timeout_seconds"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"retries": -1}, "retries"),
        ({"api_key_env": "sk-0123"}, "api_key_env"),
    ],
)
def test_impossible_setting_is_refused_with_its_key_and_no_secret(settings: dict, named: str) -> None:
    with pytest.raises(SelfalignError, match=rf"engine\.{named}") as error:
        Server(**{"command": IDLE, **settings})
    assert "sk-0123" not in str(error.value)


def test_command_may_name_the_variable_with_the_key() -> None:
    assert Server(command=f"{IDLE} --api-key $WRITER_KEY").command.endswith("$WRITER_KEY")
    assert Server(command=f'{IDLE} --api-key "$WRITER_KEY"').command.endswith('"$WRITER_KEY"')


# --- whole stages and runs -----------------------------------------------------------------------------------------


def answer(policy: PolicyCheckpoint, folder: Path, engine: Server) -> list[Response]:
    given = records_artifact(folder / "given", instructions=[instruction(f"q{n}") for n in range(5)])
    out, config = workspace(folder / "out"), RespondConfig(candidates=2, sampling=WARM)
    respond(out, config=config, policy=policy_artifact(policy), instructions=given, engine=engine, seed=3)
    return read_records(out.path / "responses.jsonl", Response)


def test_killed_stage_asks_only_for_the_batches_that_are_missing(
    tiny_policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = Server(command=IDLE, max_concurrent_completions=4, concurrency=1, retries=0)
    whole = answered(tiny_policy, monkeypatch, tmp_path / "whole", engine, [])
    seeds = [body["seed"] for body in whole.bodies[1:]]
    with pytest.raises(SelfalignError, match="no usable answer"):
        answered(tiny_policy, monkeypatch, tmp_path / "killed", engine, [*[None] * 7, Fault(500)])
    resumed = answered(tiny_policy, monkeypatch, tmp_path / "killed", engine, [])
    assert [body["seed"] for body in resumed.bodies[1:]] == seeds[4:]
    texts = [(tmp_path / name / "out" / "responses.jsonl").read_bytes() for name in ("whole", "killed")]
    assert texts[0] == texts[1]


def answered(
    policy: PolicyCheckpoint, monkeypatch: pytest.MonkeyPatch, folder: Path, engine: Server, faults: list[Fault | None]
) -> ChatServer:
    """The server that the stage has asked; the first request of all is the one that it is met with."""
    with chat_server(counted, faults) as server:
        monkeypatch.setattr(sys.modules[Server.__module__], "_free_port", lambda: port_of(server))
        answer(policy, folder, engine)
    return server


def everything_below(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_whole_run_is_written_by_a_faulty_server_and_the_key_is_nowhere(
    tiny_policy: PolicyCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every server fails first, prints the key when it starts, and repeats it in its errors and every text."""
    caplog.set_level(logging.DEBUG)
    decode = tiny_policy.load_tokenizer().decode
    tasks = ["Name two uses of wool.", "Why does salt melt ice on roads?", "Write a letter to an owl.", "List ferns."]

    def says(body: dict[str, Any]) -> bytes:
        asked, seed = decode(body["prompt"]), body.get("seed", 0)
        text = f"Answer {seed} with {KEY}."
        if asked.endswith(":"):
            text = tasks[seed % 4]
        elif "Score:" in asked:
            text = f"{KEY}\nScore: {seed % 6}"
        return continuation(text, len(body["prompt"]))

    faults = [Fault(500, KEY.encode()), Fault(429, KEY.encode(), {"Retry-After": "1"}), None, Fault(resets=True)]
    overrides = [
        *(override for override in TINY_RUN if not override.startswith("engine.")),
        *write_tiny_data(tmp_path / "data"), "iterations=1", "tracker=wandb", "judge=additive", "judge.num_samples=2",
        "engine=server", "engine.dtype=float32", "engine.api_key_env=WRITER_KEY", "engine.max_concurrent_completions=4",
        "engine.command='echo $WRITER_KEY; : {weights} {port}; exec sleep 600'",
    ]  # fmt: skip
    with chat_server(says, faults) as server:
        monkeypatch.setattr(sys.modules[Server.__module__], "_free_port", lambda: port_of(server))
        folder = run(tmp_path / "outputs", *overrides)
        asked = len(server.bodies)
        assert run(tmp_path / "outputs", *overrides) == folder
        assert len(server.bodies) == asked, "a finished run asked again"
        server.faults.append(Fault(401, f"no such key: {KEY}".encode()))
        with pytest.raises(SelfalignError, match=r"status 401: no such key: \[key\]"):
            run(tmp_path / "outputs", *overrides, "seed=7", "name=refused")
        assert set(server.keys) == {f"Bearer {KEY}"}
    responses = read_records(folder / "artifacts/iteration_1/responses/responses.jsonl", Response)
    assert {r.tokens for r in responses} == {3}
    assert all("with [key]." in r.text for r in responses)
    assert (folder / "artifacts/M2").exists()
    said = capfd.readouterr()
    haystack = everything_below(tmp_path) + said.out.encode() + said.err.encode() + caplog.text.encode()
    assert b"WRITER_KEY" in haystack
    assert KEY.encode() not in haystack
    assert KEY.encode()[3:12] not in haystack


# --- broken on purpose ---------------------------------------------------------------------------------------------

MUTANTS = {
    "seeds are not sent": (
        '"seed": seed % 2**31, ', "", test_token_ids_and_seeds_are_sent_and_completions_come_back_in_order,
    ),
    "a cut text has ended": (
        "finish_reason=reply.finish_reason", "finish_reason=FinishReason.EOS", test_text_that_was_cut_says_so,
    ),
    "no count of what was read": (
        "if reply.prompt_tokens != len(prompt):", "if False:", test_answer_that_cannot_be_the_policys_is_an_error,
    ),
    "greedy unless asked otherwise": (
        '"do_sample": True, ', "", test_exported_policy_stops_and_samples_as_ours_and_its_source_stays,
    ),
    "a default top_k": (
        '"top_k": len(tokenizer), ', "", test_exported_policy_stops_and_samples_as_ours_and_its_source_stays,
    ),
    "the source's tokenizer is written over": (
        '("*.safetensors", "*.safetensors.index.json", "config.json", "*.py")', '("*",)',
        test_exported_policy_stops_and_samples_as_ours_and_its_source_stays,
    ),
    "the adapter is forgotten": (
        'if (policy.path / "adapter").exists():', "if False:", test_adapter_is_merged_into_what_is_served,
    ),
    "the server goes on": ("stack.callback(self._server.stop)", "pass", test_nothing_is_left_of_a_server),
    "any refusal means texts": (
        "if error.status not in (400, 422):", "if False:",
        test_server_that_refuses_the_key_is_not_taken_for_another_kind,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, given: dict[str, Any]) -> None:
    old, new, check = MUTANTS[name]
    assert_caught(engine, sys.modules[__name__], old, new, check, {**given, "name": "other_tokenizer", "fails": False})


# --- a real server -------------------------------------------------------------------------------------------------


@contextmanager
def really_served(policy: PolicyCheckpoint) -> Iterator[ServerGenerator]:
    """A policy behind `transformers serve`."""
    if not is_serve_available():
        pytest.skip("transformers serve is not installed: pip install 'transformers[serving]'")
    program = Path(sys.executable).with_name("transformers")
    settings = Server(command=f"{program} serve {{weights}} --port {{port}} --dtype {{dtype}}", dtype="float32")
    with replace(settings, concurrency=1, max_concurrent_completions=8).load(policy) as generator:
        yield generator


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, tiny_policy: PolicyCheckpoint) -> Iterator[ServerGenerator]:
    """A policy that ends its turns."""
    with really_served(taught_policy(tiny_policy, tmp_path_factory.mktemp("taught"), epochs=25)) as generator:
        yield generator


@pytest.mark.parametrize(("tokens", "reason"), [(12, FinishReason.EOS), (4, FinishReason.LENGTH)])
def test_real_server_writes_what_this_process_writes(real: ServerGenerator, tokens: int, reason: FinishReason) -> None:
    greedy = Sampling(temperature=0, max_new_tokens=tokens)
    requests = asking(real._policy, "Say one thing about bees.", "Say one thing about old rivers.", "Why?")
    with Transformers(dtype="float32").load(real._policy) as generator:
        expected = generator.generate(requests, greedy)
    assert real.generate(requests, greedy) == without_ids(expected)
    assert {completion.finish_reason for [completion] in expected} == {reason}


def test_real_server_draws_by_seed(real: ServerGenerator) -> None:
    wild = Sampling(temperature=1.5, top_p=1.0, max_new_tokens=12)
    [request] = asking(real._policy, "Say one thing about bees.", seeds=4)
    first, again = real.generate([request], wild), real.generate([request], wild)
    assert first == again
    assert len({c.text for c in first[0]}) == 4


def check_served_as_here(server: ServerGenerator, policy: PolicyCheckpoint, folder: Path, tokens: int) -> str:
    """What it writes and how it judges is what this process makes of the policy; returns the first answer."""
    greedy = Sampling(temperature=0, max_new_tokens=tokens)
    requests = asking(policy, "What is the capital of France?", "Name three colours of the rainbow, please.")
    subjects = [InstructionResponse(ASKED[0], answer) for answer in ANSWERS[:2]]
    answers = server.generate(requests, greedy)
    endpoint = server._client._endpoint
    judge = ExternalScore(prompt=RUBRIC, endpoint=endpoint, num_samples=1, retries=0, sampling=greedy)
    journal = Journal(folder, lambda size: None)
    with JudgeContext(journal=journal, policy=None, reference=None, engine=Transformers(), seed=1) as context:
        judged = judge.judge(context, subjects)
    asked = [judge.ask(subject.instruction.text, subject.response.text) for subject in subjects]
    prompts = [encode_prompt(policy.load_tokenizer(), prompt) for prompt in asked]
    with Transformers(dtype="float32").load(policy) as here:
        assert answers == without_ids(here.generate(requests, greedy))
        expected = [one for [one] in here.generate([Request(prompt=prompt, seeds=[0]) for prompt in prompts], greedy)]
    assert [judgement.text for judgement in judged.judgements] == [one.text for one in expected]
    assert judged.counts["judge/prompt_tokens"] == sum(map(len, prompts))
    assert judged.counts["judge/completion_tokens"] == sum(one.tokens for one in expected)
    return answers[0][0].text


def test_policy_behind_a_real_server_writes_and_judges_as_in_this_process(
    real: ServerGenerator, tmp_path: Path
) -> None:
    check_served_as_here(real, real._policy, tmp_path, 12)


@pytest.mark.nightly
@pytest.mark.real_model
def test_smollm2_behind_a_real_server_writes_and_judges_as_in_this_process(
    smollm2: PolicyCheckpoint, tmp_path: Path
) -> None:
    with really_served(smollm2) as server:
        assert "Paris" in check_served_as_here(server, smollm2, tmp_path, 16)
