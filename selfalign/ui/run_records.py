"""The records of a run, whether it is finished, killed or still running: its artifacts and how they hang together.

An artifact's manifest names by digest what it was made from. So the judgements of responses are the artifacts that have
these responses among their inputs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from selfalign.core.errors import SelfalignError
from selfalign.core.files import read_json
from selfalign.core.records import Comparison
from selfalign.runs.labels import Label
from selfalign.runs.reader import FILES
from selfalign.store.artifacts import LOG, MANIFEST
from selfalign.store.key_diff import StageKey, read_stages
from selfalign.ui.record_file import RecordFile

Row = dict[str, Any]


@dataclass(slots=True)
class RunRecords:
    """A run that is being looked at.

    Attributes:
        folder: the run folder.
        finished: {label: its artifact}, in the order in which the pipeline makes them.
        unfinished: labels whose artifact is being made, or was given up.
    """

    folder: Path
    finished: dict[Label, StageKey] = field(init=False)
    unfinished: list[Label] = field(init=False)
    _files: dict[Path, RecordFile] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.reload()

    def reload(self) -> None:
        """Look for artifacts that were finished since.

        Raises:
            SelfalignError: the folder is not that of a run, or a manifest is damaged.
        """
        made = {Label.parse(name): artifact for name, artifact in read_stages(self.folder).items()}
        self.finished = {label: artifact for label, artifact in made.items() if artifact.digest}
        self.unfinished = [label for label, artifact in made.items() if not artifact.digest]

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.folder.resolve().name

    @property
    def config(self) -> Row:
        """The resolved configuration of the run; empty if there is none."""
        path = self.folder / "config.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def manifest(self, label: Label) -> Row:
        """Return the manifest of a finished artifact."""
        return read_json(label.link_in(self.folder) / MANIFEST)

    # --- files -------------------------------------------------------------------------------------------------------

    def file_names(self) -> dict[str, list[Label]]:
        """Return {name of a file of records: the artifacts that have one}, the best known names first."""
        found: dict[str, list[Label]] = {name: [] for name in FILES.values()}
        for label in self.finished:
            for path in self.record_files(label):
                found.setdefault(path.name, []).append(label)
        return {name: labels for name, labels in found.items() if labels}

    def record_files(self, label: Label) -> list[Path]:
        """Return the files of records of an artifact."""
        return [path for path in sorted(label.link_in(self.folder).glob("*.jsonl")) if path.name != LOG]

    def file(self, label: Label, name: str) -> RecordFile | None:
        """Return a file of an artifact; None if it has no such file."""
        path = (label.link_in(self.folder) / name).resolve()
        if path not in self._files:
            if not path.is_file():
                return None
            self._files[path] = RecordFile(path)
        return self._files[path]

    def records(self, label: Label, kind: type[Any]) -> RecordFile | None:
        """Return the records of one kind in an artifact; None if it has none."""
        return self.file(label, FILES[kind])

    # --- how artifacts hang together ---------------------------------------------------------------------------------

    def source(self, label: Label, key: str) -> Label | None:
        """Return the artifact that another one was made from; None if the run has no such artifact.

        Args:
            label: the artifact that was made.
            key: name of the input.
        """
        return next(iter(self._sources(label, key)), None)

    def sources(self, label: Label, key: str) -> list[Label]:
        """Return the artifacts of an input that is a list or a dictionary of them."""
        return list(dict.fromkeys(self._sources(label, key)))

    def _sources(self, label: Label, key: str) -> Iterator[Label]:
        value = self.finished[label].inputs.get(key)
        for digest in _digests(value):
            # Two models that write alike have equal artifacts; that of the same owner is meant.
            same = [other for other, made in self.finished.items() if made.digest == digest]
            yield from sorted(same, key=lambda other: other.owner != label.owner)[:1]

    def made_from(self, label: Label, key: str, stage: str = "") -> list[Label]:
        """Return the artifacts that were made from this one.

        Args:
            label: what they were made from.
            key: name of the input that it is.
            stage: the stage that made them; empty for any.
        """
        digest = self.finished[label].digest
        return [
            other
            for other, made in self.finished.items()
            if (not stage or made.inputs["stage"] == stage) and digest in _digests(made.inputs.get(key))
        ]

    def models(self) -> list[Label]:
        """Return the models whose weights the run has, M0 first."""
        return [label for label in self.finished if (label.link_in(self.folder) / "weights.json").is_file()]

    def model_of(self, label: Label, key: str = "policy") -> str:
        """Return the name of the model that an artifact was made with; empty if it is none of the run's."""
        made = self.source(label, key)
        return str(made) if made else ""

    def instructions_of(self, responses: Label) -> Label | None:
        """Return the instructions that responses answer."""
        return self.source(responses, "instructions") or (
            responses if self.file(responses, "instructions.jsonl") else None
        )

    def judges_of(self, responses: Label) -> list[Label]:
        """Return the judgements of responses: of a panel that of the whole behind those of its members."""
        judges = self.made_from(responses, "responses", "judge")
        return sorted(judges, key=lambda label: bool(self.sources(label, "members")))

    def comparisons_of(self, responses: Label) -> list[Label]:
        """Return the comparisons of responses: by the judge, or with another model's."""
        others = [*self.made_from(responses, "answers", "head_to_head"), *self.made_from(responses, "opponent")]
        return [one for one in [*self.judges_of(responses), *others] if self.records(one, Comparison)]

    def pairs_of(self, responses: Label) -> list[Label]:
        """Return the pairs, labelled responses or positives made from responses."""
        return self.made_from(responses, "responses", "pair")

    def holding(self, pairs: Label) -> list[Label]:
        """Return pairs and everything that they were gathered into with others."""
        found = [pairs]
        for label in found:
            found += [one for one in self.made_from(label, "parts") if one not in found]
        return found


def _digests(value: Any) -> list[str]:
    """Return the digests of an input that is an artifact, or a list or dictionary of artifacts."""
    if isinstance(value, dict) and value.keys() == {"artifact", "digest"}:
        return [value["digest"]]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [digest for item in inside for digest in _digests(item)]


def open_runs(folders: Sequence[Path]) -> list[RunRecords]:
    """Open run folders, each once.

    Raises:
        SelfalignError: one is not the folder of a run.
    """
    runs = [RunRecords(folder) for folder in dict.fromkeys(folders)]
    names = [run.name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SelfalignError(f"two runs have the name {twice[0]}: rename the folder of one")
    return runs
