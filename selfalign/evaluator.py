"""What `selfalign-evaluate` does: measures the models of finished runs, and any others, without training."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfalign.config import ExperimentConfig, compose_experiment
from selfalign.errors import SelfalignError
from selfalign.evaluation import Evaluation
from selfalign.experiment import Shown, conclude, log_file
from selfalign.files import digest_json, read_json
from selfalign.given import Given
from selfalign.models import ModelConfig
from selfalign.report import write_report
from selfalign.roles import Judging, Models, fixed_judges, load_model
from selfalign.run import Run, iteration_of, open_folder, write_provenance
from selfalign.store import Artefact, Store, canonical, locked, open_artefact
from selfalign.summary import models_of


@dataclass(frozen=True, slots=True)
class Contestant:
    """A model to measure; of a run's, `reference` is what it was trained against, `pairs` what was made until then."""

    name: str
    policy: Artefact
    reference: Artefact | None = None
    pairs: Sequence[Artefact] = ()


def evaluate_models(sources: list[str], overrides: list[str], conf: Path) -> Path:
    """Measures models as a run measures its own, each against the first and the one before it; returns the folder.

    Args:
        sources: run folders, whose models M1, M2, … and the SFT baseline are taken, or model folders and hub ids.
        overrides: settings, on top of those the first run was started with.
        conf: the folder of the configuration.

    Raises:
        SelfalignError: nothing to measure, or a run is not finished.
    """
    folders = {source: Path(source) for source in sources if (Path(source) / "config.yaml").is_file()}
    runs = {source: _artefacts(folder) for source, folder in folders.items()}
    known = [read_json(folder / "summary.json")["config"].get("overrides", []) for folder in folders.values()][:1]
    config, text, plain = compose_experiment(conf, [*(known[0] if known else []), *overrides])
    if config.dry_run:
        raise SelfalignError("dry_run=true rehearses a run, and selfalign-evaluate trains none: leave it away")
    output = Path(config.output_dir).absolute()
    identity = [canonical(config), {source: sorted(a.digest for a in made.values()) for source, made in runs.items()}]
    folder = output / f"evaluation-{digest_json([*identity, sources])[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", f"this evaluation is already running in {folder}"):
        open_folder(folder, text)
        with log_file(folder / "run.log"), config.track.open(folder, plain) as tracker:
            run = Run(folder, Store(output / "store"), tracker)
            try:
                names = _measure(config, Shown(run), sources, runs)
            finally:
                write_provenance(run, config.seed)
            conclude(run, config, {**plain, "overrides": overrides}, names, (write_report,), evaluated=sources)
    return folder


def _measure(
    config: ExperimentConfig, run: Shown, sources: list[str], runs: dict[str, dict[str, Artefact]]
) -> list[str]:
    """Measures all models and returns their names.

    The first run's M0 and M1 judge where `base` and `sft` are asked to; without a run, the first model does.
    """
    contestants: list[Contestant] = []
    for source in sources:
        prefix = f"{Path(source).name}." if len(sources) > 1 else ""
        if source in runs:
            contestants += _contestants(prefix, runs[source], config.train.reference)
        else:
            name = re.sub(r"[^\w.-]", "-", Path(source).name)
            model = ModelConfig(path=source, dtype=config.model.dtype)
            contestants.append(Contestant(name, load_model(run, name, model, "the model to evaluate")))
    if len({contestant.name for contestant in contestants}) < len(contestants):
        raise SelfalignError(f"two of the models have one name: {', '.join(c.name for c in contestants)}")
    first = contestants[0].policy
    made = next(iter(runs.values()), {})
    base, sft = made.get("M0", first), made.get("M1", made.get("M0", first))
    models = Models(base, sft, first, base, None, **fixed_judges(config, run))
    evaluation = Evaluation(config, run, Given(config, run), Judging(config, run, config.judge))
    for contestant in contestants:
        run.run.artefacts[contestant.name] = contestant.policy
        models.newest, models.reference = contestant.policy, contestant.reference or base
        models.own_pairs = list(contestant.pairs)
        evaluation.measure(contestant.name, models)
    return [contestant.name for contestant in contestants]


def _contestants(prefix: str, made: dict[str, Artefact], reference: str) -> list[Contestant]:
    """A run's models in the order they were made, the SFT baseline last."""
    base = made["M0"]
    sft = made.get("M1", base)
    found = [Contestant(f"{prefix}M1", sft, base)]
    previous = sft
    for name in models_of(made):
        if name not in ("M1", "SFT"):
            until = [f"iteration_{n}/pairs" for n in range(1, iteration_of(name) + 1)]
            pairs = [made[label] for label in until if label in made]
            against = {"base": base, "sft": sft}.get(reference, previous)
            found.append(Contestant(f"{prefix}{name}", made[name], against, pairs))
            previous = made[name]
    return [*found, *([Contestant(f"{prefix}SFT", made["SFT"], base)] if "SFT" in made else [])]


def _artefacts(folder: Path) -> dict[str, Artefact]:
    """The models of a finished run, and the pairs they were trained on."""
    if not (folder / "summary.json").is_file():
        raise SelfalignError(f"{folder}: this run is not finished; the command that began it continues it")
    labels = [stage["label"] for stage in read_json(folder / "summary.json")["stages"]]
    names = {"M0", *models_of(labels), *(label for label in labels if re.fullmatch(r"iteration_\d+/pairs", label))}
    return {name: open_artefact((folder / "artefacts" / name).resolve()) for name in labels if name in names}
