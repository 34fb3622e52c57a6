"""Check keys, servers, engines, models, files, disk and memory before a run makes anything, and report all problems."""

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

from selfalign.benchmarks.judge_test import JudgeTest
from selfalign.benchmarks.protocol import judges_to_load
from selfalign.config.data import SelfRewarding
from selfalign.config.experiment import ExperimentConfig
from selfalign.config.judges import judges_of
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
from selfalign.losses.protocol import aligns
from selfalign.models import quantization
from selfalign.models.checkpoint import resolve_dtype
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import find_local
from selfalign.pipeline.inputs import searches
from selfalign.pipeline.loop import plan
from selfalign.runs.labels import Kind, Label
from selfalign.tracking.wandb import Wandb, environment_mode, has_key
from selfalign.training.config import Optimization
from selfalign.training.optimizers import EIGHT_BIT_NEEDS

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0
"""How long requests to a server that does not answer are retried."""

LONGEST_WAIT_SECONDS = 5.0
"""Longest wait between two requests."""

IMPORT_SECONDS = 180.0
"""Time limit for importing an engine."""

SHELL = {"exec", "env", "nice", "nohup", "cd", "export", "source", ".", "eval", "if", "for", "while", "set", "ulimit"}
"""First words of a shell command that do not name the program it starts."""


def preflight(config: ExperimentConfig, made: Collection[Label]) -> None:
    """Check what the remaining stages need. Only rank 0 checks; the error is raised on all ranks.

    Args:
        config: the experiment.
        made: labels of the finished stages; if all are finished, nothing is checked.

    Raises:
        SelfalignError: something is missing; the message has a line for each problem.
    """
    if lines := distributed.on_main(lambda: problems(config, made)):
        raise SelfalignError("\n".join(lines))


def problems(config: ExperimentConfig, made: Collection[Label]) -> list[str]:
    """Return a line for each problem."""
    labels = [one.label for one in plan(config) if one.label not in made]
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
    """Return whether a model of the run still has to generate: in a stage, in a benchmark or at a checkpoint."""
    checkpoints = bool(config.train.checkpoint_selection.interval_steps) and any(label.is_aligned for label in labels)
    written = any(label.is_written for label in labels)
    return written or checkpoints or any(measured_by(name, labels) for name in config.benchmark)


def measured_by(benchmark: str, labels: list[Label]) -> bool:
    """Return whether this benchmark remains to be run on a model."""
    return any(label.kind is Kind.EVALUATION and label.part == benchmark for label in labels)


@contextmanager
def noting(lines: list[str]) -> Iterator[None]:
    """Add the message of an error inside the block to `lines`, and continue after the block."""
    try:
        yield
    except SelfalignError as error:
        lines.append(str(error))


# --- servers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerProbe:
    """A short request of the kind that a stage will send to a server.

    Attributes:
        key: the setting of the endpoint.
        endpoint: the server.
        request: the request.
    """

    key: str
    endpoint: Endpoint
    request: dict[str, Any]

    @property
    def server(self) -> tuple[str, ...]:
        """What tells servers apart."""
        endpoint = self.endpoint
        return endpoint.base_url, endpoint.model, endpoint.api_key_env, repr(endpoint.parameters)


def probes(config: ExperimentConfig, labels: list[Label]) -> list[ServerProbe]:
    """Return a probe for each endpoint that the remaining stages use."""
    judged = {
        config.judge_setting(label.iteration_number) if label.kind is Kind.ITERATION else "judge"
        for label in labels
        if label.is_judged
    }
    measured = [
        isinstance(benchmark, JudgeTest) and benchmark.judge is None and measured_by(name, labels)
        for name, benchmark in config.benchmark.items()
    ]
    judged |= {"judge"} if any(measured) else set()
    busy = {
        **dict.fromkeys(judged, True),
        "train.checkpoint_selection.head_to_head": any(label.is_aligned for label in labels),
        "data.meta_judge": any(label.is_meta_judged for label in labels),
        "evaluate.head_to_head": any(label.opponent for label in labels),
        "evaluate.preference_pairs.judge": Label.input("preferences", "scores") in labels,
    }
    judges = [(key, judge) for key, judge in judges_of(config).items() if busy.get(key.partition(".members.")[0])]
    for name, benchmark in config.benchmark.items():
        if measured_by(name, labels):
            judges.append((f"benchmark.{name}.judge", getattr(benchmark, "judge", None)))
    servers = [(key, judge) for key, judge in judges if asks_a_server(judge)]
    return [ServerProbe(f"{key}.endpoint", judge.endpoint, judge.probe()) for key, judge in servers]


def check_servers(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """Check that every server answers, accepts the key, model and parameters, and has room for the rubric."""
    servers: dict[tuple[str, ...], list[ServerProbe]] = {}
    for probe in probes(config, labels):
        servers.setdefault(probe.server, []).append(probe)
    # One request to each server is enough: the longest.
    found = [ask_server(max(group, key=lambda one: len(repr(one.request)))) for group in servers.values()]
    return [problem for problem in found if problem is not None]


def ask_server(probe: ServerProbe) -> str | None:
    """Return what is wrong with a server, in one line, or None if it answers."""
    key, endpoint = probe.key, probe.endpoint
    try:
        reply = first_reply(probe)
    except RefusedError as error:
        return f"{key}: {error}{advice(probe, error.status)}"
    except PassingError as error:
        if "status 429" not in str(error):
            return f"{key}: {endpoint.name} gives no usable answer ({error}); is the server running at {key}.base_url?"
        logger.warning("%s: %s is busy (%s); the request will be repeated", key, endpoint.name, error)
        return None
    except SelfalignError as error:
        return str(error)
    return too_long(probe) if reply.finish_reason is FinishReason.PROMPT_TOO_LONG else None


def first_reply(probe: ServerProbe) -> Reply:
    """Return a server's first reply. Errors that may pass are retried for `ANSWER_SECONDS` at most.

    Raises:
        SelfalignError: the environment has no key, the server refuses the request, or it gives no answer in time.
    """
    endpoint = probe.endpoint
    until, wait = time.monotonic() + ANSWER_SECONDS, endpoint.backoff_seconds
    with endpoint.open(probe.key) as client:
        for _ in range(endpoint.retries):
            try:
                return client.attempt(probe.request)
            except PassingError as error:
                pause = max(wait, error.wait_seconds)
                if time.monotonic() + pause > until:
                    raise
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        return client.attempt(probe.request)


def too_long(probe: ServerProbe) -> str:
    """Return the message about a model whose context is too short."""
    return (
        f"{probe.key}: {probe.endpoint.name} refuses the rubric as too long, even with a response of one word. Take "
        "a model with a longer context, a shorter prompt, or fewer tokens for an answer"
    )


def advice(probe: ServerProbe, status: int) -> str:
    """Return what to check when a server refuses a request."""
    key, variable = probe.key, probe.endpoint.api_key_env
    match status:
        case 401 | 403:
            return f"; check the key in {variable}" if variable else f"; it needs a key: set {key}.api_key_env"
        case 404:
            return f"; check {key}.model, and that {key}.base_url ends before /chat/completions"
        case 400 | 422:
            return f"; {key}.parameters changes the request, and null leaves a parameter out"
        case _:
            return ""


# --- engines and packages ----------------------------------------------------------------------------------------


def check_engine(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """Check that the engine of the remaining generation can be started."""
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
                pass  # Opening it has checked the key.
    return lines


def check_import(python: str) -> list[str]:
    """Check that vLLM can be imported in its environment."""
    try:
        done = subprocess.run(
            [python, "-P", "-c", "import vllm"], capture_output=True, timeout=IMPORT_SECONDS, check=False
        )
    except OSError as error:
        return [f"engine.python: {python} cannot be run ({error.strerror})"]
    except subprocess.TimeoutExpired:
        logger.warning("engine=vllm: %s has not imported vLLM within %.0f s", python, IMPORT_SECONDS)
        return []
    if done.returncode == 0:
        return []
    stderr = [line.strip() for line in done.stderr.decode("utf-8", errors="replace").splitlines() if line.strip()]
    return [
        f"engine=vllm: {python} cannot import vLLM ({stderr[-1][:200] if stderr else 'without a message'}); set "
        "engine.python to the interpreter of an environment that has vLLM"
    ]


def check_command(command: str) -> list[str]:
    """Check that the program of a server's command exists, as far as the command shows it."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        return [f"engine.command cannot be read by a shell ({error}): {command}"]
    program = next((word for word in words if not re.match(r"[A-Za-z_]\w*=", word)), "")
    named = re.fullmatch(r"[\w./+@%:-]+", program) and program not in SHELL
    return [f"engine.command: there is no program {program}"] if named and shutil.which(program) is None else []


def check_packages(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """Check that bitsandbytes is installed where 4-bit weights or the 8-bit optimizer need it."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        return []
    lines = [quantization.NEEDS] if config.model.quantization != "none" else []
    small = [key for key, settings in trainings(config, labels) if settings.optimizer == "adamw_8bit"]
    return lines + [f"{key}.{EIGHT_BIT_NEEDS}" for key in small]


def check_layout(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """Check that the number of processes fits the parallelism of the remaining trainings."""
    lines: list[str] = []
    with noting(lines):
        if trained(labels):
            config.train.parallelism.check_possible()
    return lines


def check_tracking(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """Check that each tracker is installed, and that W&B has a key if it is used online, and a valid environment."""
    lines: list[str] = []
    for tracking in config.tracker.values():
        with noting(lines):
            tracking.check_installed()
            if not isinstance(tracking, Wandb) or environment_mode() == "disabled":
                continue
            if tracking.mode == "online" and not has_key():
                lines.append(
                    "tracker.wandb.mode=online needs an API key of Weights & Biases: run `wandb login`, set "
                    "WANDB_API_KEY, or set tracker.wandb.mode=offline"
                )
    return lines


# --- files and models --------------------------------------------------------------------------------------------


def check_data(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """Check that every data file exists."""
    lines: list[str] = []
    for look in searches(config):
        with noting(lines):
            look()
    return lines


def check_models(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """Check that every model that is named by a folder exists. Models of a hub are looked for when they are fetched."""
    lines: list[str] = []
    for key, model in named_models(config).items():
        with noting(lines):
            find_local(model, key)
    return lines


def named_models(config: ExperimentConfig) -> dict[str, ModelConfig]:
    """Return {setting: model} of all models from outside the run."""
    data = config.data
    paths = {f"{key}.model": judge.model for key, judge in judges_of(config).items() if wants_model(judge)}
    paths |= {f"benchmark.{name}.judge.model": path for name, path in judges_to_load(config.benchmark).items()}
    if isinstance(data, SelfRewarding) and data.instruct.fixed_writer:
        paths["data.instruct.model"] = data.instruct.model
    return {"model.path": config.model, **{key: ModelConfig(path=path) for key, path in paths.items()}}


# --- disk and memory ---------------------------------------------------------------------------------------------


def trainings(config: ExperimentConfig, labels: list[Label]) -> list[tuple[str, Optimization]]:
    """Return the remaining trainings as (setting, optimization)."""
    tuned, aligned = ("train.sft", config.train.sft), ("train.align", config.train.align)
    later = aligned if aligns(config.loss) else tuned
    found = {key: settings for key, settings in ((later if label.is_aligned else tuned) for label in trained(labels))}
    return list(found.items())


def trained(labels: list[Label]) -> list[Label]:
    """Return the labels of the models that remain to be trained."""
    return [label for label in labels if label.is_trained]


def check_room(config: ExperimentConfig, labels: list[Label]) -> list[str]:
    """Check disk and memory, as far as M0's files state its size."""
    lines: list[str] = []
    with noting(lines):
        folder = find_local(config.model, "model.path")
        size = Footprint.of(folder, config.model) if folder else None
        if size is None:
            return lines
        if isinstance(config.engine, Transformers) and writes(config, labels):
            lines += writing_lack(size, resolve_dtype(config.engine.dtype, writing=True))
        if optimizers := {key: settings.optimizer for key, settings in trainings(config, labels)}:
            lines += training_lack(size, optimizers, config.train.parallelism)
            output = Path(config.output_dir).absolute()
            lines += disk_lack(size, len(trained(labels)), optimizers.values(), output)
    return lines
