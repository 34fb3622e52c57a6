"""Write the pairs and judgements that a run made as a data set: parquet files that `datasets` loads, and their card.

Given pairs are none of it: they are somebody's data already, maybe under a licence.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from selfalign.core.files import write_atomically
from selfalign.core.jsonl import chunks, join_sorted
from selfalign.core.records import Instruction, Message, PreferencePair, Prompt
from selfalign.data.thinking import ask_to_think
from selfalign.data.turns import as_prompt
from selfalign.report.markdown import bullets, code, fenced, table
from selfalign.report.model_card import last_model, reproduction, settings, sources
from selfalign.runs.labels import Label
from selfalign.runs.reader import Finished, stream_judged

if TYPE_CHECKING:
    from datasets import Features

Row = dict[str, Any]

MEANINGS = {
    "pairs": "Preference pairs whose two answers ended by themselves. `chosen` and `rejected` are what was written, a "
    "thought before the answer included.",
    "cut_pairs": "Pairs with an answer that was cut at the token limit, which `chosen_finished` or `rejected_finished` "
    "tells. Who trains on the texts alone teaches to end there.",
    "judgements": "Every judgement of every answer. `status` tells why there is no `score`; `judge` and `writer` are "
    "the digests of the models that judged and wrote.",
}
"""{configuration: what it holds}."""


def write_data_set(run: Finished, folder: Path, repository: str = "") -> dict[str, dict[str, int]]:
    """Write the files and README.md of a run's data set, and return {configuration: {split: rows}}.

    Splits are the iterations. Where a run made no pairs and judged nothing, nothing is written.

    Args:
        run: the finished run.
        folder: where they are written, `<configuration>/<split>.parquet`.
        repository: owner/name on the hub, for the card.
    """
    sizes: dict[str, dict[str, int]] = {}
    for number in [] if "path" in run.config["data"] else run.iterations:
        for name, rows in tables(run, number).items():
            split = split_of(number)
            if size := write_table(folder / name / f"{split}.parquet", name, rows):
                sizes.setdefault(name, {})[split] = size
    if sizes:
        write_atomically(folder / "README.md", [data_card(run, sizes, repository).encode()])
    return sizes


def split_of(number: int) -> str:
    """Return the name of an iteration's split: that of its folder among the artifacts."""
    return str(Label.iteration(number, ""))


def tables(run: Finished, number: int) -> dict[str, Iterator[Row]]:
    """Return {configuration: its rows} of an iteration."""
    label = Label.iteration(number, "pairs")

    def pairs(*, whole: bool) -> Iterator[Row]:
        return (pair_row(one) for one in run.records(label, PreferencePair) if is_whole(one) == whole)

    return {"pairs": pairs(whole=True), "cut_pairs": pairs(whole=False), "judgements": judgement_rows(run, label)}


def is_whole(pair: PreferencePair) -> bool:
    """Whether both answers of a pair ended by themselves."""
    return pair.chosen_finished and pair.rejected_finished


def pair_row(pair: PreferencePair) -> Row:
    """Return a pair as it was trained on: the prompt with the request for a thought, and answers with their thoughts.

    ε of the pair is there where it has one of its own.
    """
    row = {
        "id": pair.id,
        "prompt": turns_of(ask_to_think(pair.thought_prompt, pair.prompt)),
        "chosen": pair.chosen_thought + pair.chosen,
        "rejected": pair.rejected_thought + pair.rejected,
        "chosen_score": pair.chosen_score,
        "rejected_score": pair.rejected_score,
        "label_smoothing": None if pair.label_smoothing is UNSET else pair.label_smoothing,
        "instruction_id": pair.instruction_id,
        "chosen_id": pair.chosen_id,
        "rejected_id": pair.rejected_id,
    }
    ended = {"chosen_finished": pair.chosen_finished, "rejected_finished": pair.rejected_finished}
    return row if is_whole(pair) else row | ended


def judgement_rows(run: Finished, label: Label) -> Iterator[Row]:
    """Yield the judgements of an iteration, each with the instruction and the answer that were judged."""
    judged = stream_judged(run.folder, label)
    file = label.sibling("responses").link_in(run.folder)
    instructions = run.records(label.sibling("instructions"), Instruction)
    for instruction, answers in join_sorted(instructions, judged, lambda one: one.response.instruction_id, file):
        for answer in answers:
            for one in answer.judgements:
                yield {
                    "id": one.id,
                    "prompt": turns_of(instruction.prompt),
                    "response": answer.response.text,
                    "status": one.status.value,
                    "score": one.score,
                    "text": one.text,
                    "judge": one.model,
                    "entropy": one.entropy,
                    "sample": one.sample,
                    "attempt": one.attempt,
                    "instruction_id": instruction.id,
                    "response_id": one.response_id,
                    "finish_reason": answer.response.finish_reason.value,
                    "writer": answer.response.model,
                }


def turns_of(prompt: Prompt) -> list[Message]:
    """Return the turns of a prompt, with their roles and texts alone."""
    turns = as_prompt(prompt) if isinstance(prompt, str) else prompt
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


# --- schema ------------------------------------------------------------------------------------------------------

TEXTS = {
    "pairs": "id chosen rejected instruction_id chosen_id rejected_id",
    "judgements": "id response status text judge instruction_id response_id finish_reason writer",
}
NUMBERS = {"pairs": "chosen_score rejected_score label_smoothing", "judgements": "score entropy"}
OTHERS = {"pairs": {}, "judgements": {"sample": "int64", "attempt": "int64"}}
FLAGS = {"chosen_finished": "bool", "rejected_finished": "bool"}


def features_of(name: str) -> "Features":
    """Return the schema of a configuration."""
    from datasets import Features, List, Value

    kind = "judgements" if name == "judgements" else "pairs"
    types = dict.fromkeys(TEXTS[kind].split(), "string") | dict.fromkeys(NUMBERS[kind].split(), "float64")
    types |= OTHERS[kind] | (FLAGS if name == "cut_pairs" else {})
    turns = List({"role": Value("string"), "content": Value("string")})
    return Features({"id": Value("string"), "prompt": turns} | {key: Value(value) for key, value in types.items()})


def write_table(path: Path, name: str, rows: Iterator[Row]) -> int:
    """Write rows as a parquet file, a few thousand at a time, and return their number; no file if there are none."""
    import pyarrow
    import pyarrow.parquet

    schema, size = features_of(name).arrow_schema, 0
    first = next(parts := chunks(rows), None)
    if first is None:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        for part in (first, *parts):
            file.write_table(pyarrow.Table.from_pylist(part, schema=schema))
            size += len(part)
    return size


# --- card --------------------------------------------------------------------------------------------------------


def data_card(run: Finished, sizes: Mapping[str, Mapping[str, int]], repository: str) -> str:
    """Return the card, which is a valid README.md of a data set's repository."""
    body = "\n\n".join(
        f"## {title}\n\n{text}"
        for title, text in {
            "Use": use(sizes, repository),
            "Content": content(sizes),
            "How it was made": made(run),
            "Licence": licence(run),
            "Reproduction": reproduction(run),
        }.items()
    )
    title = f"Pairs and judgements of {run.summary['name']}, up to {last_model(run)}"
    return f"---\n{metadata(sizes)}\n---\n\n# {code(title)}\n\n{body}\n"


def metadata(sizes: Mapping[str, Mapping[str, int]]) -> str:
    """Return the front matter: files and schema of each configuration. No licence is stated, because none is known."""
    from datasets.info import DatasetInfo, DatasetInfosDict
    from huggingface_hub import DatasetCardData

    files = {
        name: [{"split": split, "path": f"{name}/{split}.parquet"} for split in splits]
        for name, splits in sizes.items()
    }
    data = DatasetCardData(
        configs=[{"config_name": name, "data_files": listed} for name, listed in files.items()],
        tags=["selfalign", "preference", "synthetic"],
        task_categories=["text-generation"],
    )
    infos = {name: DatasetInfo(features=features_of(name), config_name=name) for name in sizes}
    DatasetInfosDict(infos).to_dataset_card_data(data)
    return data.to_yaml()


def use(sizes: Mapping[str, Mapping[str, int]], repository: str) -> str:
    """Return the section on loading the data."""
    name, split = next((name, next(iter(splits))) for name, splits in sizes.items())
    lines = ["from datasets import load_dataset", "", f"load_dataset({repository!r}, {name!r}, split={split!r})"]
    said = fenced("\n".join(lines), "python")
    if repository and "pairs" in sizes:
        train = f"selfalign data=pairs data.path={repository}:pairs:{next(iter(sizes['pairs']))} iterations=1"
        said += f"\n\nTrain on it:\n\n{fenced(train, 'sh')}"
    return said


def content(sizes: Mapping[str, Mapping[str, int]]) -> str:
    """Return the section on configurations, splits and columns."""
    splits = list(dict.fromkeys(split for counts in sizes.values() for split in counts))
    rows = [["configuration", *splits, "columns"]]
    for name, counts in sizes.items():
        columns = ", ".join(map(code, features_of(name)))
        rows.append([code(name), *(str(counts.get(split, 0)) for split in splits), columns])
    return f"{table(rows)}\n\n{bullets([f'{code(name)}: {MEANINGS[name]}' for name in sizes])}"


def made(run: Finished) -> str:
    """Return the section on who wrote, who judged and how pairs were chosen."""
    first = Label.iteration(run.iterations[0], "pairs")
    lines = [f"M0: {code(run.config['model']['path'])}"]
    lines += [f"Judge: {settings(run.judging)}"] if run.judging else []
    if rule := run.inputs(first).get("rule"):
        lines.append(f"Pair rule: {settings(rule)}")
    lines += [f"`{split_of(number)}` trained M{number + 1}" for number in run.iterations]
    lines.append("Models wrote and judged these texts. They may be wrong, and nobody has read all of them.")
    return bullets(lines)


def licence(run: Finished) -> str:
    """Return the section on the licence: what it depends on."""
    lines = [f"M0: {code(run.config['model']['path'])}"]
    lines += [f"{one.purpose.capitalize()}: {code(one.name)}, {code(one.content)}" for one in sources(run)]
    said = (
        "None is stated here, because selfalign cannot know it: it depends on those of the models and of the given data"
    )
    return f"{said}.\n\n{bullets(lines)}"
