"""Evaluate the models of finished runs, and other models, without training: `selfalign-evaluate`."""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

from selfalign.config.experiment import ExperimentConfig
from selfalign.config.hydra import compose_experiment
from selfalign.config.overrides import check_recorded
from selfalign.core.errors import SelfalignError
from selfalign.core.failures import at_the_end
from selfalign.core.files import digest_json
from selfalign.data.mixtures import identify_source, parts_of
from selfalign.engines.resident import workers_may_stay
from selfalign.launch.experiment import conclude, described, log_file, read_own, tell_resolved, warn_of_settings
from selfalign.launch.live import LiveReport
from selfalign.launch.sweep import JOBS, Sweep
from selfalign.losses.protocol import Loss, aligns
from selfalign.models.config import ModelConfig
from selfalign.pipeline.dtypes import resolve_dtypes
from selfalign.pipeline.evaluation import GIVEN, Evaluation
from selfalign.pipeline.inputs import RunInputs, data_sources, find_files
from selfalign.pipeline.models import RunJudge, RunModels, fixed_judges, load_from_outside
from selfalign.report import write_report
from selfalign.report.comparison_sentences import contents
from selfalign.report.jobs import JobResult, as_text, differing, flat, told_apart, with_absent
from selfalign.runs.folder import open_folder
from selfalign.runs.labels import BASELINE, Kind, Label
from selfalign.runs.ledger import open_ledger
from selfalign.runs.provenance import code_state, write_provenance
from selfalign.runs.reader import Finished, check_artifacts
from selfalign.runs.runner import CacheLookup, NotMadeYet, Runner, StageRunner
from selfalign.runs.summary import models_of
from selfalign.runs.sweep_jobs import JobState, varying_overrides
from selfalign.runs.tracker import open_trackers
from selfalign.store.artifacts import Artifact, Store, locked, open_artifact
from selfalign.store.key import to_key_json
from selfalign.tracking.tables import log_tables

logger = logging.getLogger(__name__)

LONGEST_NAME = 60
"""Maximum length of a job's overrides as the name of its models, in characters. Longer ones become `job_N`."""

MEASURING = ("data.seed_data", "engine", "judge")
"""Settings that training and evaluation share."""

REWARDING = ("loss", "at", "train.reference_policy")
"""Settings that a model's rewards depend on."""

MEASURED_BY = (*MEASURING, *REWARDING, "benchmark", "data.schema", "evaluate", "model.dtype", "seed", "train.align")
"""Settings that the metrics of models depend on."""


ASKED_BY = ("chat_template", "chat_template_arguments", "system_prompt", "thinking")
"""Settings of `model` that say how a model is asked. Models of a run keep theirs."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A model to evaluate.

    For a model of a finished run, `reference` is its reference policy and `pairs` the preference pairs that it was
    trained on up to its iteration.

    Attributes:
        name: of the model.
        policy: the model.
        reference: the policy it was trained against; None for a model from outside a run.
        pairs: the preference pairs that its run had replayed by then, and those that it had generated.
        loss: of its run.
        seed_data: the demonstrations and ranked answers that its run was given.
    """

    name: str
    policy: Artifact
    reference: Artifact | None = None
    pairs: Sequence[Artifact] = ()
    loss: Loss | None = None
    seed_data: Sequence[Artifact] = ()


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A finished run whose models are evaluated.

    Attributes:
        name: prefix of its models' names.
        folder: the run folder.
        made: {label: artifact} of its models and their training data.
        settings: the configuration of the run, with its overrides.
        job: whether it is a job of a sweep; of a job, only M1 and the last model are evaluated.
        shares_first: whether all jobs of that sweep have the same M1.
    """

    name: str
    folder: Path
    made: dict[Label, Artifact]
    settings: dict[str, Any]
    job: bool = False
    shares_first: bool = False

    def contestants(self, config: ExperimentConfig, *, named: bool) -> list[Contestant]:
        """Return the models in the order they were made, the SFT baseline last.

        Args:
            config: how they were trained.
            named: whether their names begin with the run's.
        """
        seeds = self.made.get(Label.input("seeds"))
        known: dict[str, Any] = {"loss": config.loss, "seed_data": [seeds] if seeds else []}
        base, prefix = self.made[Label.model("M0")], f"{self.name}." if named else ""
        sft = self.made.get(Label.model("M1"), base)
        found = [Contestant("M1" if self.shares_first else f"{prefix}M1", sft, base, **known)]
        previous = sft
        for label in map(Label.model, models_of(self.made)):
            if label.is_aligned:
                numbers = range(1, label.iteration_number + 1)
                until = [Label.iteration(n, part) for part in ("replayed_pairs", "pairs") for n in numbers]
                pairs = [self.made[one] for one in until if one in self.made]
                known["loss"] = loss = config.in_iteration(label.iteration_number).loss
                named_reference = config.train.reference_policy if aligns(loss) else loss.init
                against = {"base": base, "sft": sft}.get(named_reference, previous)
                found.append(Contestant(f"{prefix}{label}", self.made[label], against, pairs, **known))
                previous = self.made[label]
        if self.job:
            return [found[0], *found[1:][-1:]]
        baseline = self.made.get(Label.model(BASELINE))
        known["loss"] = config.loss
        return [*found, *([Contestant(f"{prefix}{BASELINE}", baseline, base, **known)] if baseline else [])]


def evaluate_models(sources: list[str], overrides: list[str], conf: Path, config_dir: Path | None = None) -> Path:
    """Evaluate models as a run evaluates its own, each against the first and the one before it. Return the folder.

    Args:
        sources: run folders, for the models M1, M2, … and the SFT baseline; sweep folders, for M1 and the last model of
            each finished job; or model folders and hub ids.
        overrides: settings on top of those of the first run.
        conf: the folder of the configuration.
        config_dir: a folder with the user's own options.

    Raises:
        SelfalignError: dry_run is set, a run is not finished, or two models have the same name.
    """
    runs = {source: found for source in sources if (found := _runs_at(Path(source)))}
    every = [run for found in runs.values() for run in found]
    compose = partial(_compose, overrides=overrides, command=overrides, conf=conf, config_dir=config_dir)
    check = partial(_check_settings, overrides=overrides, conf=conf, config_dir=config_dir)
    config, text, plain = compose(every[0] if every else None)
    for run in every[:1]:
        check(run, MEASURED_BY)
    if config.dry_run:
        raise SelfalignError("dry_run=true is not supported by selfalign-evaluate (it does not train). Remove it.")
    output = Path(config.output_dir).absolute()
    trained = _as_trained(every, config, compose, check)
    digests = {run.name: sorted(a.digest for a in run.made.values()) for run in every}
    identity = [to_key_json(config), digests]
    folder = output / f"evaluation-{digest_json([*identity, sources])[:8]}"
    asked = {name: getattr(config.model, name) for name in ASKED_BY if name in _given_of_model(overrides)}
    ledger = open_ledger(folder, log_tables)
    runner = Runner(Store(output / "store"), ledger=ledger)
    if ledger is None:
        with workers_may_stay():
            _measure(config, runner, sources, runs, trained, asked, {})
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", f"this evaluation is already running in {folder}"):
        look = CacheLookup(runner.store)
        with suppress(NotMadeYet, SelfalignError, OSError):
            _measure(config, look, sources, runs, trained, asked, {})
        open_folder(folder, text, look.asked)
        told = described(config, {**plain, "overrides": overrides}) | {"evaluated": sources}
        live = LiveReport(folder, told, evaluated_models)
        with log_file(folder / "run.log"), live, open_trackers(config.tracker, folder, plain) as ledger.tracker:
            ledger.begun = live.begin
            warn_of_settings(config, {"overrides": overrides})
            _tell_differences(every)
            _tell_how_asked(every, [source for source in sources if source not in runs], overrides)
            for run in every[:1]:
                _tell_changed_data(run, config)
            tell_resolved(folder, config)
            with at_the_end(partial(write_provenance, ledger, config.seed, code_state())), workers_may_stay():
                names = _measure(config, runner, sources, runs, trained, asked, ledger.artifacts)
            for label, made in ledger.artifacts.items():
                ledger.link(label, made.path)  # Of the models too, which were made elsewhere.
            conclude(ledger, live, names, (write_report,))
    return folder


def evaluated_models(labels: Iterable[Label]) -> list[str]:
    """Return the names of the models among the artifacts so far."""
    return [str(label) for label in labels if not label.part and Label.names_model(str(label))]


def _compose(
    run: FinishedRun | None, overrides: list[str], command: list[str], conf: Path, config_dir: Path | None
) -> tuple[ExperimentConfig, str, dict[str, Any]]:
    """Compose the configuration of a run with further overrides; `command` has all those of the command line."""
    recorded = run.settings.get("overrides", []) if run else []
    if run:
        check_recorded(recorded, run.folder, command)
    return compose_experiment(conf, [*recorded, *overrides], config_dir)


def _check_settings(
    run: FinishedRun, names: Sequence[str], overrides: list[str], conf: Path, config_dir: Path | None
) -> None:
    """Check that the overrides of a run still compose to the settings that it had.

    A preset, or a file that a setting names, may have been edited since.

    Args:
        run: the run.
        names: the settings that matter, with all below them.
        overrides: settings on top, which count whatever the run had.
        conf: the folder of the configuration.
        config_dir: a folder of options that are the user's own.

    Raises:
        SelfalignError: some settings have changed.
    """
    given = [_key_of(override) for override in overrides]
    known = flat(run.settings)

    def matters(key: str) -> bool:
        set_then = any(_is_below(one, key) for one in known) and not str(known.get(key)).startswith("file:")
        return set_then and any(_is_below(key, name) for name in names) and not any(_is_below(key, n) for n in given)

    told = (known, flat(_compose(run, [], overrides, conf, config_dir)[2]))
    jobs = with_absent([JobResult(name=run.name, folder=run.folder, settings=settings) for settings in told])
    then, now = (job.settings for job in jobs)
    if changed := [key for key in differing(jobs) if matters(key)]:
        texts = [(key, as_text(then[key]), as_text(now[key])) for key in changed]
        told = [f"{key}={' is now '.join(told_apart(values).values())}" for key, *values in texts]
        raise SelfalignError(
            f"{run.folder}: options or files that the run was started with have changed: {'; '.join(told)}. Restore "
            "them, or set on the command line what to evaluate with"
        )


def _tell_changed_data(run: FinishedRun, config: ExperimentConfig) -> None:
    """Warn about data sources of a run that have other content now, so that metrics on them are not comparable."""
    recorded = {(setting, source): content for setting, source, content in contents(Finished.load(run.folder))}
    for setting, source in data_sources(config).items():
        for name, now in parts_of(to_key_json(source), identify_source(source, setting)):
            if recorded.get((setting, name), now) != now:
                logger.warning("%s=%s holds other data than when %s was made", setting, name, run.folder.name)


def _key_of(override: str) -> str:
    """Return the setting that an override sets; for an option of a group, where it is placed."""
    key = override.lstrip("+~").partition("=")[0]
    return (key.partition("@")[2] or key).strip("/").replace("/", ".")


def _is_below(key: str, name: str) -> bool:
    """Return whether a setting is `name` or below it."""
    return key == name or key.startswith(f"{name}.")


def training_of(run: FinishedRun) -> str:
    """Return the digest of the settings that the rewards of a run's models depend on."""
    settings = {"at": {}, **run.settings}
    return digest_json([settings["choices"]["loss"], *(_setting(settings, name) for name in REWARDING)])


def _as_trained(
    runs: Sequence[FinishedRun],
    first: ExperimentConfig,
    compose: Callable[[FinishedRun], tuple[ExperimentConfig, Any, Any]],
    check: Callable[[FinishedRun, Sequence[str]], None],
) -> dict[str, ExperimentConfig]:
    """Return {`training_of` a run: its configuration}; that of the first run is `first`."""
    known = {training_of(run): first for run in runs[:1]}
    for run in runs[1:]:
        if training_of(run) not in known:
            check(run, REWARDING)
            known[training_of(run)] = compose(run)[0]
    return known


def _setting(settings: dict[str, Any], name: str) -> Any:
    """Return the part of a run's settings with this dotted name."""
    return reduce(dict.__getitem__, name.split("."), settings)


def _tell_differences(runs: Sequence[FinishedRun]) -> None:
    """Warn of evaluation settings that differ between the runs; those of the first run are used."""
    differ = [name for name in MEASURING if len({digest_json(_setting(run.settings, name)) for run in runs}) > 1]
    if differ:
        logger.warning(
            "the runs differ in %s: all models are evaluated with the settings of %s",
            *(", ".join(differ), runs[0].folder.name),
        )


def _given_of_model(overrides: Sequence[str]) -> dict[str, str]:
    """Return {setting of `model`: its override}; the option of the group is under the empty name."""
    keys = {override: _key_of(override).split(".") for override in overrides}
    return {".".join(key[1:2]): override for override, key in keys.items() if key[0] == "model"}


def _tell_how_asked(runs: Sequence[FinishedRun], others: Sequence[str], overrides: Sequence[str]) -> None:
    """Warn of settings of `model` that have no effect, and of those that only the runs' models are asked by."""
    given = _given_of_model(overrides)
    for name, override in given.items():
        if name in ASKED_BY and not others:
            logger.warning("%s has no effect: the models of a run are asked as they were trained", override)
        elif name not in (*ASKED_BY, "dtype"):
            logger.warning("%s has no effect: the models to evaluate are named, and nothing is trained", override)
    set_in_runs = [name for name in ASKED_BY if any(_is_set(run.settings["model"].get(name)) for run in runs)]
    if others and (only := [f"model.{name}" for name in set_in_runs if name not in given]):
        logger.warning(
            "%s is asked without %s of the runs: give them on the command line to ask it by them too",
            *(", ".join(others), ", ".join(only)),
        )


def _is_set(value: Any) -> bool:
    return any(value.values()) if isinstance(value, dict) else bool(value)


def _measure(
    config: ExperimentConfig,
    run: StageRunner,
    sources: list[str],
    runs: dict[str, list[FinishedRun]],
    trained: dict[str, ExperimentConfig],
    asked: dict[str, Any],
    known: dict[Label, Artifact],
) -> list[str]:
    """Evaluate all models and return their names, which are the keys of `known` afterwards.

    Each run's rewards use its own loss and reference, as `trained` says. Models that are no run's have the settings
    `asked`. `base` and `sft` are the first run's M0 and
    M1; without a run, both are the first model.
    """
    config = resolve_dtypes(config)
    contestants: list[Contestant] = []
    for source in sources:
        for found in runs.get(source, []):
            named = len(sources) > 1 or found.job
            entered = found.contestants(trained[training_of(found)], named=named)
            listed = [(contestant.name, contestant.policy) for contestant in contestants]
            contestants += entered[found.shares_first and (entered[0].name, entered[0].policy) in listed :]
        if source not in runs:
            name = plain_name(Path(source).name)
            model = ModelConfig(path=source, dtype=config.model.dtype, **asked)
            contestants.append(
                Contestant(name, load_from_outside(run, Label.parse(name), model, "the model to evaluate"))
            )
    names = [contestant.name for contestant in contestants]
    if len(set(names)) < len(names):
        raise SelfalignError(f"two models have the same name ({', '.join(names)}): rename the folder of one of them")
    if config.evaluate.reference_outputs and GIVEN in names:
        raise SelfalignError(
            f"a model is named {GIVEN}, like the outputs of evaluate.reference_outputs: rename its folder"
        )
    if taken := [name for name in names if not Label.names_model(name)]:
        raise SelfalignError(
            f"a model cannot be named {taken[0]}, as other artifacts of an evaluation are: rename its folder"
        )
    first = contestants[0].policy
    made = next((found.made for several in runs.values() for found in several), {})
    base, sft = made.get(Label.model("M0"), first), made.get(Label.model("M1"), made.get(Label.model("M0"), first))
    models = RunModels(base, sft, first, base, base, **fixed_judges(config, run))
    find_files(config)
    learnt = {artifact.digest: artifact for c in contestants for artifact in (*c.seed_data, *c.pairs)}
    given = RunInputs(config, run, [*learnt.values()])
    evaluation = Evaluation(config, run, given, RunJudge(config, run, config.judge))
    for contestant in contestants:
        known[Label.parse(contestant.name)] = contestant.policy
        models.current, models.reference = contestant.policy, contestant.reference
        models.generated_pairs = list(contestant.pairs)
        evaluation.measure(contestant.name, models, loss=contestant.loss, trained_on=contestant.seed_data)
    return names


def _runs_at(path: Path) -> list[FinishedRun]:
    """Return the run in a folder, or the finished jobs of the sweep in it; nothing for any other folder.

    Raises:
        SelfalignError: no job is finished.
    """
    if (path / "config.yaml").is_file():
        return [FinishedRun(path.name, path, _artifacts(path), _settings(path))]
    if not (path / JOBS).is_file():
        return []
    jobs = Sweep(path).jobs()
    done = {job.folder: job for job in reversed(jobs) if job.state is JobState.finished and job.folder}
    finished = sorted(done.values(), key=lambda job: job.number)  # Two jobs of the same settings have one folder.
    if not finished:
        raise SelfalignError(f"{path}: no job of this sweep is finished. Repeat the sweep's command to continue it")
    names = [plain_name(varying_overrides(job, jobs)) for job in finished]
    if max(map(len, names)) > LONGEST_NAME:
        names = [f"job_{job.number}" for job in finished]
    folders = [path / (job.folder or "") for job in finished]
    made = [_artifacts(folder) for folder in folders]
    m1 = Label.model("M1")
    shared = len({one[m1].digest if m1 in one else "" for one in made}) == 1
    found = zip(names, folders, made, map(_settings, folders), strict=True)
    return [FinishedRun(*of_job, job=True, shares_first=shared) for of_job in found]


def plain_name(text: str) -> str:
    """Return a text as part of a folder's name: other characters than letters, digits, `_`, `.` and `-` become `-`."""
    return re.sub(r"[^\w.-]+", "-", text)


def _settings(folder: Path) -> dict[str, Any]:
    """Return the configuration that a finished run was started with."""
    return read_own(folder / "summary.json")["config"]


def _artifacts(folder: Path) -> dict[Label, Artifact]:
    """Return {label: artifact} of a finished run's models and their training data."""
    if not (folder / "summary.json").is_file():
        raise SelfalignError(f"{folder}: this run is not finished. Repeat the run's command to continue it")
    labels = [Label.parse(stage["label"]) for stage in read_own(folder / "summary.json")["stages"]]
    check_artifacts(folder, labels)
    wanted = {Label.model("M0"), Label.input("seeds"), *map(Label.model, models_of(labels))}
    wanted |= {label for label in labels if label.kind is Kind.ITERATION and label.part in ("pairs", "replayed_pairs")}
    return {label: open_artifact(label.link_in(folder).resolve()) for label in labels if label in wanted}
