"""What can be known before anything is made: keys, servers, engines, models, files, disk and memory, all at once."""

import importlib.util
import logging
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfalign.benchmarks.protocol import judges_to_load
from selfalign.config.data import SelfRewarding
from selfalign.config.experiment import ExperimentConfig
from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.records import FinishReason
from selfalign.engines.openai_client import Endpoint
from selfalign.engines.replies import PassingError, RefusedError, Reply
from selfalign.engines.server import Server
from selfalign.engines.transformers import Transformers
from selfalign.engines.vllm_engine import VLLM, share_gpus
from selfalign.judges.protocol import asks_a_server, wants_model
from selfalign.launch.footprint import Footprint, disk_lack, training_lack, writing_lack
from selfalign.models import quantization
from selfalign.models.checkpoint import resolve_dtype
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import find_local
from selfalign.pipeline.inputs import searches
from selfalign.pipeline.loop import plan
from selfalign.pipeline.models import judges_of
from selfalign.runs.labels import Kind, Label
from selfalign.tracking.wandb import Wandb, environment_mode, has_key
from selfalign.training.config import Optimization
from selfalign.training.optimizers import EIGHT_BIT_NEEDS

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0
"""A server that does not answer is asked again for so long."""

LONGEST_WAIT_SECONDS = 5.0
"""Between two tries."""

IMPORT_SECONDS = 180.0
"""An engine may take so long to be imported."""

SHELL = {"exec", "env", "nice", "nohup", "cd", "export", "source", ".", "eval", "if", "for", "while", "set", "ulimit"}
"""What a command may begin with that says nothing of the program behind it."""


def preflight(config: ExperimentConfig, made: Collection[Label]) -> None:
    """Checks what the stages that are still to be made will need; of several processes the main one does.

    Args:
        config: the experiment.
        made: labels of the stages that are there; where all are, nothing is needed.

    Raises:
        SelfalignError: something is missing; the message has a line for each.
    """
    if lines := distributed.on_main(lambda: problems(config, made)):
        raise SelfalignError("\n".join(lines))


def problems(config: ExperimentConfig, made: Collection[Label]) -> list[str]:
    """A line for everything that is missing."""
    labels = [label for label, _ in plan(config) if label not in made]
    checks: list[Callable[[ExperimentConfig, list[Label]], list[str]]] = [
        check_tracking,
        check_packages,
        check_layout,
        check_data,
        check_models,
        check_room,
        check_engine,
        check_servers,
    ]
    found = [problem for check in checks for problem in check(config, labels)] if labels else []
    return list(dict.fromkeys(found))


def writes(config: ExperimentConfig, labels: list[Label]) -> bool:
    """Whether a model of the run still has to write: in a stage of its own, in a benchmark, or at a checkpoint."""
    checkpoints = bool(config.train.checkpoint_selection.interval_steps) and any(label.is_aligned for label in labels)
    written = any(label.is_written for label in labels)
    return written or checkpoints or any(measured_by(name, labels) for name in config.benchmark)


def measured_by(benchmark: str, labels: list[Label]) -> bool:
    """Whether a model remains to be put through this benchmark."""
    return any(label.kind is Kind.EVALUATION and label.part == benchmark for label in labels)


@contextmanager
def noting(lines: list[str]) -> Iterator[None]:
    """Adds what is refused inside to the lines, and goes on behind it."""
    try:
        yield
    except SelfalignError as error:
        lines.append(str(error))


# --- servers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerProbe:
    """A request as a stage will send it, about one word; `key` is the setting of whom it goes to."""

    key: str
    endpoint: Endpoint
    request: dict[str, Any]

    @property
    def server(self) -> tuple[str, ...]:
        """What a server is told apart by."""
        endpoint = self.endpoint
        return endpoint.base_url, endpoint.model, endpoint.api_key_env, repr(endpoint.parameters)


def questions(config: ExperimentConfig, labels: list[Label]) -> list[ServerProbe]:
    """One for each who will be asked."""
    busy = {
        "judge": any(label.is_judged for label in labels),
        "train.checkpoint_selection.head_to_head": any(label.is_aligned for label in labels),
        "evaluate.head_to_head": any(label.opponent for label in labels),
        "evaluate.preference_pairs.judge": Label.input("preferences", "scores") in labels,
    }
    asked = [(key, judge) for key, judge in judges_of(config).items() if busy[key]]
    for name, benchmark in config.benchmark.items():
        if measured_by(name, labels):
            asked.append((f"benchmark.{name}.judge", getattr(benchmark, "judge", None)))
    servers = [(key, judge) for key, judge in asked if asks_a_server(judge)]
    return [ServerProbe(f"{key}.endpoint", judge.endpoint, judge.probe()) for key, judge in servers]


def check_servers(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """Every server has its key, is there, knows the model, takes the parameters and has room for the rubric."""
    servers: dict[tuple[str, ...], list[ServerProbe]] = {}
    for question in questions(config, labels):
        servers.setdefault(question.server, []).append(question)
    # Of what one server will be asked, the longest.
    answers = [ask_server(max(asked, key=lambda one: len(repr(one.request)))) for asked in servers.values()]
    return [problem for problem in answers if problem is not None]


def ask_server(question: ServerProbe) -> str | None:
    """Return what is wrong with a server, in one line, or None where it answers."""
    key, endpoint = question.key, question.endpoint
    try:
        reply = first_reply(question)
    except RefusedError as error:
        return f"{key}: {error}{advice(question, error.status)}"
    except PassingError as error:
        if "status 429" not in str(error):
            return f"{key}: {endpoint.name} gives no usable answer ({error}); is the server there, at {key}.base_url?"
        logger.warning("%s: %s is busy (%s); it will be asked again", key, endpoint.name, error)
        return None
    except SelfalignError as error:
        return str(error)
    return too_long(question) if reply.finish_reason is FinishReason.PROMPT_TOO_LONG else None


def first_reply(question: ServerProbe) -> Reply:
    """Ask a server, again after a trouble that may pass, for `ANSWER_SECONDS` at most.

    Raises:
        SelfalignError: the environment has no key, the server refuses the request, or it gives no answer in time.
    """
    endpoint = question.endpoint
    until, wait = time.monotonic() + ANSWER_SECONDS, endpoint.backoff_seconds
    with endpoint.open(question.key) as client:
        for _ in range(endpoint.retries):
            try:
                return client.attempt(question.request)
            except PassingError as error:
                pause = max(wait, error.wait_seconds)
                if time.monotonic() + pause > until:
                    raise
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        return client.attempt(question.request)


def too_long(question: ServerProbe) -> str:
    """A server whose model has too short a context."""
    return (
        f"{question.key}: {question.endpoint.name} refuses the rubric as too long, about a response of one word; take "
        "a model with a longer context, a shorter prompt, or fewer tokens of an answer"
    )


def advice(question: ServerProbe, status: int) -> str:
    """What to look at when a server refuses."""
    key, variable = question.key, question.endpoint.api_key_env
    match status:
        case 401 | 403:
            return f"; look at the key in {variable}" if variable else f"; set {key}.api_key_env, it wants a key"
        case 404:
            return f"; is {key}.model there, and does {key}.base_url end in front of /chat/completions?"
        case 400 | 422:
            return f"; {key}.parameters changes what is asked, and null leaves a parameter out"
        case _:
            return ""


# --- engines and packages ----------------------------------------------------------------------------------------


def check_engine(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """What writes can be started."""
    engine, lines = config.engine, list[str]()
    if not (writes(config, labels) or any(label.is_judged or label.opponent for label in labels)):
        return lines
    with noting(lines):
        if isinstance(engine, VLLM):
            lines += check_import(engine.python or sys.executable)
            share_gpus(engine.replicas, engine.tensor_parallel_size)
        if isinstance(engine, Server):
            lines += check_command(engine.command)
            with engine.endpoint("http://localhost/v1", "policy").open("engine"):
                pass  # Its key is there.
    return lines


def check_import(python: str) -> list[str]:
    """vLLM can be imported in its environment."""
    try:
        done = subprocess.run(
            [python, "-P", "-c", "import vllm"], capture_output=True, timeout=IMPORT_SECONDS, check=False
        )
    except OSError as error:
        return [f"engine.python: {python} cannot be run ({error.strerror})"]
    except subprocess.TimeoutExpired:
        logger.warning("engine=vllm: %s has not imported vLLM in %.0f s", python, IMPORT_SECONDS)
        return []
    if done.returncode == 0:
        return []
    said = [line.strip() for line in done.stderr.decode("utf-8", errors="replace").splitlines() if line.strip()]
    return [
        f"engine=vllm: {python} cannot import vLLM ({said[-1][:200] if said else 'it says nothing'}); set "
        "engine.python to the interpreter of an environment that has it"
    ]


def check_command(command: str) -> list[str]:
    """The program that a server's command begins with is there, as far as that can be told."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        return [f"engine.command cannot be read by a shell ({error}): {command}"]
    program = next((word for word in words if not re.match(r"[A-Za-z_]\w*=", word)), "")
    named = re.fullmatch(r"[\w./+@%:-]+", program) and program not in SHELL
    return [f"engine.command: there is no program {program}"] if named and shutil.which(program) is None else []


def check_packages(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """The package is installed that 4-bit weights and the 8-bit optimiser need."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        return []
    lines = [quantization.NEEDS] if config.model.quantization != "none" else []
    small = [key for key, settings in trainings(config, labels) if settings.optimizer == "adamw_8bit"]
    return lines + [f"{key}.{EIGHT_BIT_NEEDS}" for key in small]


def check_layout(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """There are as many processes as the layout of what is still to be trained needs."""
    lines: list[str] = []
    with noting(lines):
        if trained(labels):
            config.train.parallelism.check_possible()
    return lines


def check_tracking(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """Weights & Biases has a key where it has to be reached, and its environment is in order."""
    lines: list[str] = []
    with noting(lines):
        wanted = (
            isinstance(config.tracker, Wandb) and environment_mode() != "disabled" and config.tracker.mode == "online"
        )
        if wanted and not has_key():
            lines.append(
                "tracker.mode=online needs an API key of Weights & Biases: run `wandb login`, set WANDB_API_KEY, or "
                "take "
                "tracker.mode=offline"
            )
    return lines


# --- files and models --------------------------------------------------------------------------------------------


def check_data(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """Every file of data that is named is there."""
    lines: list[str] = []
    for look in searches(config):
        with noting(lines):
            look()
    return lines


def check_models(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """Every model that is named by a folder is there; those of a hub are looked for when they are fetched."""
    lines: list[str] = []
    for key, model in named_models(config).items():
        with noting(lines):
            find_local(model, key)
    return lines


def named_models(config: ExperimentConfig) -> dict[str, ModelConfig]:
    """{setting: model} of all that come from outside the run."""
    data = config.data
    paths = {f"{key}.model": judge.model for key, judge in judges_of(config).items() if wants_model(judge)}
    paths |= {f"benchmark.{name}.judge.model": path for name, path in judges_to_load(config.benchmark).items()}
    if isinstance(data, SelfRewarding) and data.instruct.fixed_writer:
        paths["data.instruct.model"] = data.instruct.model
    return {"model.path": config.model, **{key: ModelConfig(path=path) for key, path in paths.items()}}


# --- disk and memory ---------------------------------------------------------------------------------------------


def trainings(config: ExperimentConfig, labels: list[Label]) -> list[tuple[str, Optimization]]:
    """(setting, how it trains) of those that remain."""
    tuned, aligned = ("train.sft", config.train.sft), ("train.align", config.train.align)
    later = aligned if config.loss.pairwise else tuned
    found = {key: settings for key, settings in ((later if label.is_aligned else tuned) for label in trained(labels))}
    return list(found.items())


def trained(labels: list[Label]) -> list[Label]:
    """The models that remain to be trained."""
    return [label for label in labels if label.is_trained]


def check_room(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """Disk and memory hold what is to come, as far as M0's files tell how large it is."""
    lines: list[str] = []
    with noting(lines):
        folder = find_local(config.model, "model.path")
        size = Footprint.of(folder, config.model) if folder else None
        if size is None:
            return lines
        if isinstance(config.engine, Transformers) and writes(config, labels):
            lines += writing_lack(size, resolve_dtype(config.engine.dtype))
        if optimizers := {key: settings.optimizer for key, settings in trainings(config, labels)}:
            lines += training_lack(size, optimizers, config.train.parallelism)
            output = Path(config.output_dir).absolute()
            lines += disk_lack(size, len(trained(labels)), optimizers.values(), output)
    return lines
