"""Writing candidates and judging them: ours against transformers' generate() and vLLM with the same weights.

    python experiments/speed/generation.py --prompts 8 --samples 4 --max-new-tokens 128

The prompts are the shipped evaluation instructions, the settings those of a run (T=0.7, top-p 0.9), and sequences end
where the model ends them: a token counts up to and with its sequence's stop token. Variants alternate within a round,
and the figure of a variant is the median of its rounds; a judge's is responses judged a second. vLLM takes part if
`--vllm-python` names an interpreter that has it. Writes a table to the screen and JSON to `--out`.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # As selfalign sets it.

import torch
import yaml

from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import write_records
from selfalign.core.records import FinishReason, Instruction, Response
from selfalign.data.turns import as_prompt
from selfalign.engines.protocol import Request, Sampling
from selfalign.engines.transformers import Transformers, TransformersGenerator
from selfalign.engines.vllm_engine import VLLM
from selfalign.models.checkpoint import PolicyCheckpoint, resolve_dtype
from selfalign.models.config import ModelConfig
from selfalign.models.pretrained import fetch_pretrained
from selfalign.models.tokenizer import decode_response, encode_prompt
from selfalign.stages.judge import ExpectedScore, ImplicitReward, Pairwise, SampledScore, judge
from selfalign.store.artifacts import Artifact, StageOutput

ROOT = Path(__file__).resolve().parents[2]
Texts = list[tuple[str, int]]
"""What was written, and how many tokens that were."""

RATIOS = [
    ("sampling: ours against generate(), same batch", "ours", "generate"),
    ("sampling: ours against generate(), one prompt at a time", "ours", "generate_single"),
    ("sampling: ours against vLLM", "ours", "vllm"),
    ("greedy: ours against generate(), same batch", "ours_greedy", "generate_greedy"),
    ("greedy: ours against vLLM", "ours_greedy", "vllm_greedy"),
    ("judging: expected_score against additive", "expected_score", "additive"),
]
"""(what, the faster, the slower): the rate of the first over that of the second."""


def now() -> float:
    """A clock that waits for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def rows(name: str) -> list[dict[str, Any]]:
    """The shipped data of this name."""
    return [json.loads(line) for line in (ROOT / f"selfalign/data/shipped/{name}.jsonl").read_text().splitlines()]


# --- writing -------------------------------------------------------------------------------------------------------


def ours(generator: Any, prompts: list[list[int]], samples: int, sampling: Sampling) -> Texts:
    """One batch of an engine, prompt by prompt."""
    requests = [
        Request(prompt=prompt, seeds=[100 * n + sample for sample in range(samples)])
        for n, prompt in enumerate(prompts)
    ]
    return [(c.text, c.tokens) for group in generator.generate(requests, sampling) for c in group]


def generate(generator: TransformersGenerator, prompts: list[list[int]], samples: int, sampling: Sampling) -> Texts:
    """The same through transformers' generate()."""
    model: Any = generator.policy.model
    pad, stops = generator.tokenizer.pad_token_id, generator.stops.tolist()
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts for _ in range(samples)], device=model.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts for _ in range(samples)], device=model.device
    )
    chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    torch.manual_seed(0)
    whole = model.generate(
        ids, attention_mask=mask, max_new_tokens=sampling.max_new_tokens, eos_token_id=stops, pad_token_id=pad, **chosen
    )
    texts: Texts = []
    for written in whole[:, width:].tolist():
        end = next((place + 1 for place, token in enumerate(written) if token in stops), len(written))
        texts.append((decode_response(generator.tokenizer, written[:end]), end))
    return texts


def writing(job: argparse.Namespace, generator: TransformersGenerator, vllm: Any) -> dict[str, Callable[[], Texts]]:
    """{variant: one turn of it}."""
    asked = [row["instruction"] for row in rows("evaluation")[: job.prompts]]
    prompts = [encode_prompt(generator.tokenizer, as_prompt(text)) for text in asked]
    warm, greedy = (Sampling(temperature=t, max_new_tokens=job.max_new_tokens) for t in (0.7, 0.0))

    def one_at_a_time() -> Texts:
        return [text for prompt in prompts[: job.single] for text in generate(generator, [prompt], 1, warm)]

    of_vllm = {
        "vllm": lambda: ours(vllm, prompts, job.samples, warm),
        "vllm_greedy": lambda: ours(vllm, prompts, job.samples, greedy),
    }
    return {
        **(of_vllm if vllm else {}),
        "ours": lambda: ours(generator, prompts, job.samples, warm),
        "generate": lambda: generate(generator, prompts, job.samples, warm),
        "generate_single": one_at_a_time,
        "ours_greedy": lambda: ours(generator, prompts, job.samples, greedy),
        "generate_greedy": lambda: generate(generator, prompts, job.samples, greedy),
    }


# --- judging -------------------------------------------------------------------------------------------------------


def rubric(name: str) -> str:
    """The prompt of a judge in conf/judge."""
    return yaml.safe_load((ROOT / f"conf/judge/{name}.yaml").read_text())["prompt"]


def given(folder: Path, count: int) -> Artifact:
    """Ranked answers to judge, with their instructions: `count` in all."""
    instructions: list[Instruction] = []
    responses: list[Response] = []
    for row in rows("ranked"):
        if len(responses) >= count:
            break
        instructions.append(Instruction(id=row["id"], text=row["instruction"], source="ranked"))
        for n, answer in enumerate(row["responses"][: count - len(responses)]):
            about = {"finish_reason": FinishReason.EOS, "tokens": 0, "model": "human"}
            responses.append(Response(id=f"{row['id']}-{n}", instruction_id=row["id"], text=answer["text"], **about))
    write_records(folder / "instructions.jsonl", instructions)
    write_records(folder / "responses.jsonl", responses)
    return folder_artifact(folder)


def folder_artifact(folder: Path) -> Artifact:
    """A folder as a finished artifact."""
    return Artifact(stage="given", key=folder.name, path=folder, digest="", counts={}, seconds=0.0)


def judges_of(job: argparse.Namespace) -> dict[str, tuple[Any, int]]:
    """{judge: (how it judges, how often it loads a model)}; written ones judge once."""
    written = {"num_samples": 1, "max_failure_rate": 1.0, "sampling": Sampling(max_new_tokens=job.rationale)}
    justified = ExpectedScore(prompt=rubric("expected_score_justified"), rationale_tokens=job.rationale)
    return {
        "expected_score": (ExpectedScore(prompt=rubric("expected_score")), 1),
        "expected_score_justified": (justified, 2),
        "additive": (SampledScore(prompt=rubric("additive"), **written), 1),
        "multiple_choice": (SampledScore(prompt=rubric("multiple_choice"), min_score=1, **written), 1),
        "pairwise": (Pairwise(prompt=rubric("texts/comparison")), 1),
        "implicit": (ImplicitReward(), 2),
    }


def nudged(policy: PolicyCheckpoint, folder: Path) -> PolicyCheckpoint:
    """A policy of other weights, as a reference for the implicit reward."""
    folder.mkdir()
    loaded, files = policy.load("float32"), PolicyCheckpoint(folder)
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1e-3)
    files.save(loaded, policy)
    return files


def judging(job: argparse.Namespace, policy: PolicyCheckpoint, folder: Path) -> dict[str, Callable[[], float]]:
    """{judge: seconds of one turn, without loading models}."""
    judges, backend = judges_of(job), Transformers(dtype=job.dtype)
    (folder / "given").mkdir()
    subjects, reference = given(folder / "given", job.judgements), nudged(policy, folder / "reference")

    def seconds(name: str) -> float:
        kind, loads = judges[name]
        started = now()
        policy.load(job.dtype)
        loaded = now()
        with tempfile.TemporaryDirectory() as place:
            out = StageOutput(Path(place), name, lambda row: None)
            try:
                judge(
                    out,
                    judge=kind,
                    policy=folder_artifact(policy.path),
                    reference=folder_artifact(reference.path) if name == "implicit" else None,
                    instructions=subjects,
                    responses=subjects,
                    engine=backend,
                    seed=0,
                )
            except SelfalignError as error:
                # A model this small may write no score at all; the time is the same.
                print(f"{name}: {str(error)[:100]}", file=sys.stderr)
        return (now() - loaded) - loads * (loaded - started)

    return {name: lambda name=name: seconds(name) for name in judges}


# --- measuring -----------------------------------------------------------------------------------------------------


def compare(job: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All variants, alternating, and their rates: tokens or judgements a second."""
    (folder / "policy").mkdir()
    policy = fetch_pretrained(ModelConfig(path=job.model), folder / "policy")
    generator = Transformers(dtype=job.dtype, max_batch_tokens=1 << 30).load(policy)
    with ExitStack() as stack:
        vllm = None
        if job.vllm_python:
            engine = VLLM(python=job.vllm_python, dtype=job.dtype, max_model_len=1024, gpu_memory_utilization=0.3)
            vllm = stack.enter_context(engine.load(policy))
        return measure(job, generator, writing(job, generator, vllm), judging(job, policy, folder))


def measure(
    job: argparse.Namespace,
    generator: TransformersGenerator,
    writers: dict[str, Callable[[], Texts]],
    judges: dict[str, Callable[[], float]],
) -> dict[str, Any]:
    """Each variant's turns and what came of them."""
    rates: dict[str, list[float]] = {name: [] for name in (*writers, *judges) if name in job.variants}
    greedy: dict[str, Texts] = {}
    for number in range(job.rounds):
        for name in rates:
            started = now()
            if name in writers:
                texts = writers[name]()
                rates[name].append(sum(tokens for _, tokens in texts) / (now() - started))
                greedy |= {name: texts} if "greedy" in name else {}
            else:
                rates[name].append(job.judgements / judges[name]())
            print(f"round {number + 1} {name}: {rates[name][-1]:.2f} a second", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    result: dict[str, Any] = {
        "machine": machine(generator.policy.model.device),
        "settings": {name: value for name, value in vars(job).items() if name not in ("out", "variants")},
        "variants": {name: {"rate": medians[name], "rounds": values} for name, values in rates.items()},
        "ratios": {what: medians[a] / medians[b] for what, a, b in RATIOS if a in medians and b in medians},
    }
    if theirs := greedy.pop("generate_greedy", None):
        result["greedy_texts"] = len(theirs)
        result["greedy_texts_equal"] = {
            name: sum(a == b for a, b in zip(texts, theirs, strict=True)) for name, texts in greedy.items()
        }
    return result


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    import transformers

    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"name": name, "threads": torch.get_num_threads(), **versions}


def show(result: dict[str, Any]) -> None:
    """The result as tables."""
    print("| variant | a second, median (lowest to highest) |\n|---|---|")
    for name, row in result["variants"].items():
        print(f"| `{name}` | {row['rate']:.2f} ({min(row['rounds']):.2f} to {max(row['rounds']):.2f}) |")
    print("\n| ratio | |\n|---|---|")
    for name, value in result["ratios"].items():
        print(f"| {name} | {value:.2f} × |")
    for name, equal in result.get("greedy_texts_equal", {}).items():
        print(f"\ngreedy texts of `{name}` equal to generate()'s: {equal} of {result['greedy_texts']}")


def main() -> None:
    """Parses the command line."""
    writers = ["ours", "generate", "generate_single", "vllm", "ours_greedy", "generate_greedy", "vllm_greedy"]
    judges = ["expected_score", "expected_score_justified", "additive", "multiple_choice", "pairwise", "implicit"]
    variants = [*writers, *judges]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="packaged:smollm2-135m-instruct", help="as model.path of a run")
    parser.add_argument("--dtype", default="auto", help="as engine.dtype of a run")
    parser.add_argument("--vllm-python", default="", help="as engine.python of a run")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4, help="completions of each prompt")
    parser.add_argument("--single", type=int, default=2, help="prompts that are also written one at a time")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--judgements", type=int, default=16)
    parser.add_argument("--rationale", type=int, default=128, help="most tokens of a written judgement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    job = parser.parse_args()
    job.dtype = resolve_dtype(job.dtype, writing=True)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(job, Path(folder))
    show(result)
    if job.out:
        job.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
