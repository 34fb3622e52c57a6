"""What `selfalign-evaluate` does: measures the models of finished runs, and any others, without training."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

from selfalign.config.experiment import ExperimentConfig
from selfalign.config.hydra import compose_experiment
from selfalign.core import distributed
from selfalign.core.errors import SelfalignError
from selfalign.core.failures import at_the_end
from selfalign.core.files import digest_json
from selfalign.launch.experiment import Shown, conclude, log_file, read_own, tell_resolved
from selfalign.launch.sweep import JOBS, Sweep
from selfalign.losses.preference import Positives, PreferenceLoss
from selfalign.models.config import ModelConfig
from selfalign.pipeline.dtypes import auto_dtypes, resolve_dtypes
from selfalign.pipeline.evaluation import Evaluation
from selfalign.pipeline.inputs import Given
from selfalign.pipeline.models import Judging, Models, fixed_judges, load_model
from selfalign.report import write_report
from selfalign.runs.folder import open_folder
from selfalign.runs.labels import iteration_of
from selfalign.runs.provenance import write_provenance
from selfalign.runs.reader import check_artefacts
from selfalign.runs.runner import Fellow, Maker, Run
from selfalign.runs.summary import models_of
from selfalign.runs.sweep_jobs import JobState, told
from selfalign.store.artifacts import Artefact, Store, canonical, locked, open_artefact

logger = logging.getLogger(__name__)

LONGEST_NAME = 60
"""Letters that a job's overrides may have to name its models."""

MEASURING = ("data.seeds", "generate", "judge")
"""Settings that training and measuring share."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A model to measure.

    Attributes:
        name: of it.
        policy: the model.
        reference: what a run's model was trained against.
        pairs: what its run had made to train on until then.
        loss: of its run.
        taught: the demonstrations and ranked answers that its run was given.
    """

    name: str
    policy: Artefact
    reference: Artefact | None = None
    pairs: Sequence[Artefact] = ()
    loss: PreferenceLoss | Positives | None = None
    taught: Sequence[Artefact] = ()


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run to measure.

    Attributes:
        name: what its models' names begin with.
        folder: where it lies.
        made: its models, and what they were trained on.
        settings: what it was started with.
        job: whether it is a sweep's, of which M1 and the last model are measured.
        shares_first: whether all jobs of that sweep have this M1.
    """

    name: str
    folder: Path
    made: dict[str, Artefact]
    settings: dict[str, Any]
    job: bool = False
    shares_first: bool = False

    def contestants(self, config: ExperimentConfig, *, named: bool) -> list[Contestant]:
        """Its models in the order they were made, the SFT baseline last; with its name where they are `named`.

        Args:
            config: says how they were trained.
            named: whether it stands beside others.
        """
        loss, reference = config.loss, config.train.reference
        if isinstance(loss, Positives):
            reference = "base" if loss.start == "base" else "previous"
        known = {"loss": loss, "taught": [self.made["seeds"]] if "seeds" in self.made else []}
        base, prefix = self.made["M0"], f"{self.name}." if named else ""
        sft = self.made.get("M1", base)
        found = [Contestant("M1" if self.shares_first else f"{prefix}M1", sft, base, **known)]
        previous = sft
        for name in models_of(self.made):
            if name not in ("M1", "SFT"):
                until = [f"iteration_{n}/pairs" for n in range(1, iteration_of(name) + 1)]
                pairs = [self.made[label] for label in until if label in self.made]
                against = {"base": base, "sft": sft}.get(reference, previous)
                found.append(Contestant(f"{prefix}{name}", self.made[name], against, pairs, **known))
                previous = self.made[name]
        if self.job:
            return [found[0], *found[1:][-1:]]
        return [*found, *([Contestant(f"{prefix}SFT", self.made["SFT"], base)] if "SFT" in self.made else [])]


def evaluate_models(sources: list[str], overrides: list[str], conf: Path) -> Path:
    """Measures models as a run measures its own, each against the first and the one before it; returns the folder.

    Args:
        sources: run folders, whose models M1, M2, … and the SFT baseline are taken; sweep folders, of whose finished
            jobs M1 and the last model are taken; or model folders and hub ids.
        overrides: settings, on top of those the first run was started with.
        conf: the folder of the configuration.

    Raises:
        SelfalignError: nothing to measure, or a run is not finished.
    """
    runs = {source: found for source in sources if (found := _runs_at(Path(source)))}
    every = [run for found in runs.values() for run in found]
    config, text, plain = _compose(conf, every[0].settings if every else {}, overrides)
    if config.dry_run:
        raise SelfalignError("dry_run=true rehearses a run, and selfalign-evaluate trains none: leave it away")
    output = Path(config.output_dir).absolute()
    trained = _as_trained(every, config, overrides, conf)
    digests = {run.name: sorted(a.digest for a in run.made.values()) for run in every}
    identity = [canonical(config), digests]
    folder, store = output / f"evaluation-{digest_json([*identity, sources])[:8]}", Store(output / "store")
    if not distributed.is_main():
        _measure(config, Fellow(store), sources, runs, trained, {})
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", f"this evaluation is already running in {folder}"):
        open_folder(folder, text)
        with log_file(folder / "run.log"), config.track.open(folder, plain) as tracker:
            _tell_differences(every)
            run = Run(folder, store, tracker)
            tell_resolved(folder, auto_dtypes(config))
            with at_the_end(partial(write_provenance, run, config.seed)):
                names = _measure(config, Shown(run), sources, runs, trained, run.artefacts)
            conclude(run, config, {**plain, "overrides": overrides}, names, (write_report,), evaluated=sources)
    return folder


def _compose(
    conf: Path, settings: dict[str, Any], overrides: list[str]
) -> tuple[ExperimentConfig, str, dict[str, Any]]:
    """The settings of a run with others on top."""
    return compose_experiment(conf, [*settings.get("overrides", []), *overrides])


def _training_of(run: FinishedRun) -> str:
    """The digest of the settings that its models' rewards depend on."""
    settings = run.settings
    return digest_json([settings["loss"], settings["choices"]["loss"], settings["train"]["reference"]])


def _as_trained(
    runs: Sequence[FinishedRun], first: ExperimentConfig, overrides: list[str], conf: Path
) -> dict[str, ExperimentConfig]:
    """How each run was trained, by `_training_of` it; the first as `first` says."""
    known = {_training_of(run): first for run in runs[:1]}
    for run in runs[1:]:
        if _training_of(run) not in known:
            known[_training_of(run)] = _compose(conf, run.settings, overrides)[0]
    return known


def _setting(run: FinishedRun, name: str) -> Any:
    """The part of a run's settings that has this dotted name."""
    return reduce(dict.__getitem__, name.split("."), run.settings)


def _tell_differences(runs: Sequence[FinishedRun]) -> None:
    """Says in which settings that measure the runs differ: those of the first are taken."""
    differ = [name for name in MEASURING if len({digest_json(_setting(run, name)) for run in runs}) > 1]
    if differ:
        logger.warning("the runs differ in %s: all are measured with %s's", ", ".join(differ), runs[0].folder.name)


def _measure(
    config: ExperimentConfig,
    run: Maker,
    sources: list[str],
    runs: dict[str, list[FinishedRun]],
    trained: dict[str, ExperimentConfig],
    known: dict[str, Artefact],
) -> list[str]:
    """Measures all models and returns their names, by which they are `known` from then on.

    Each run's rewards are by its own loss and reference, as `trained` says. The first run's M0 and M1 judge where
    `base` and `sft` are asked to; without a run, the first model does.
    """
    config = resolve_dtypes(config)
    contestants: list[Contestant] = []
    for source in sources:
        for found in runs.get(source, []):
            named = len(sources) > 1 or found.job
            entered = found.contestants(trained[_training_of(found)], named=named)
            there = [(contestant.name, contestant.policy) for contestant in contestants]
            contestants += entered[found.shares_first and (entered[0].name, entered[0].policy) in there :]
        if source not in runs:
            name = plain_name(Path(source).name)
            model = ModelConfig(path=source, dtype=config.model.dtype)
            contestants.append(Contestant(name, load_model(run, name, model, "the model to evaluate")))
    if len({contestant.name for contestant in contestants}) < len(contestants):
        raise SelfalignError(f"two of the models have one name: {', '.join(c.name for c in contestants)}")
    first = contestants[0].policy
    made = next((found.made for several in runs.values() for found in several), {})
    base, sft = made.get("M0", first), made.get("M1", made.get("M0", first))
    models = Models(base, sft, first, base, None, **fixed_judges(config, run))
    evaluation = Evaluation(config, run, Given(config, run), Judging(config, run, config.judge))
    for contestant in contestants:
        known[contestant.name] = contestant.policy
        models.newest, models.reference = contestant.policy, contestant.reference or base
        models.own_pairs = list(contestant.pairs)
        evaluation.measure(contestant.name, models, loss=contestant.loss, taught=contestant.taught)
    return [contestant.name for contestant in contestants]


def _runs_at(path: Path) -> list[FinishedRun]:
    """The runs a folder stands for: itself, or the finished jobs of a sweep; none for anything else.

    Raises:
        SelfalignError: no job is finished.
    """
    if (path / "config.yaml").is_file():
        return [FinishedRun(path.name, path, _artefacts(path), _settings(path))]
    if not (path / JOBS).is_file():
        return []
    jobs = Sweep(path).jobs()
    done = {job.folder: job for job in reversed(jobs) if job.state is JobState.finished and job.folder}
    finished = sorted(done.values(), key=lambda job: job.number)  # Two jobs of the same settings have one folder.
    if not finished:
        raise SelfalignError(f"{path}: no job of this sweep is finished; the same command continues it")
    names = [plain_name(told(job, jobs)) for job in finished]
    if max(map(len, names)) > LONGEST_NAME:
        names = [f"job_{job.number}" for job in finished]
    folders = [path / (job.folder or "") for job in finished]
    made = [_artefacts(folder) for folder in folders]
    shared = len({one["M1"].digest if "M1" in one else "" for one in made}) == 1
    found = zip(names, folders, made, map(_settings, folders), strict=True)
    return [FinishedRun(*of_job, job=True, shares_first=shared) for of_job in found]


def plain_name(text: str) -> str:
    """A text as part of a folder's name."""
    return re.sub(r"[^\w.-]+", "-", text)


def _settings(folder: Path) -> dict[str, Any]:
    """What a finished run was started with."""
    return read_own(folder / "summary.json")["config"]


def _artefacts(folder: Path) -> dict[str, Artefact]:
    """The models of a finished run, and what they were trained on."""
    if not (folder / "summary.json").is_file():
        raise SelfalignError(f"{folder}: this run is not finished; the command that began it continues it")
    labels = [stage["label"] for stage in read_own(folder / "summary.json")["stages"]]
    check_artefacts(folder, labels)
    names = {
        "M0",
        "seeds",
        *models_of(labels),
        *(label for label in labels if re.fullmatch(r"iteration_\d+/pairs", label)),
    }
    return {name: open_artefact((folder / "artefacts" / name).resolve()) for name in labels if name in names}
