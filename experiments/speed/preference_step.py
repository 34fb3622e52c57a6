"""One optimiser step of preference training: ours against TRL's DPOTrainer.

    python experiments/speed/preference_step.py --shape small --dtype float32

Same weights, pairs, dtype and threads. Every turn of every variant is a process of its own (so peak memory is its
own), variants alternate within a round, and the figure of a variant is the median of its rounds' fastest steps.
TRL's variants need the extra `bench`. Writes a table to the screen and JSON to `--out`.
"""

import argparse
import copy
import json
import math
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # As selfalign sets it.

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 1024,
    },
    "small": {
        "hidden_size": 384,
        "num_hidden_layers": 10,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "intermediate_size": 1024,
        "vocab_size": 32000,
    },
    "smollm2_135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
    },
    "llama_1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
    },
    "llama_8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
PROMPT, RESPONSE, AUGMENTATION = (128, 512), (64, 256), 40
"""Lengths in tokens: of prompts and responses, uniform between these, and of p."""

BETA, LAM = 0.1, 0.5


def draw_pairs(count: int, vocabulary: int, seed: int) -> list[dict[str, list[int]]]:
    """Pairs of random tokens; `p_ids` stands beside the prompt in the second pass of Sr-DPO."""
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(length)]

    p = ids(AUGMENTATION)
    return [
        {
            "prompt_ids": ids(draw.randint(*PROMPT)),
            "chosen_ids": ids(draw.randint(*RESPONSE)),
            "rejected_ids": ids(draw.randint(*RESPONSE)),
            "p_ids": p,
        }
        for _ in range(count)
    ]


def count_tokens(rows: list[dict[str, list[int]]]) -> dict[str, int]:
    """Tokens of the pairs in three ways of counting: the prompt once, as a pair needs it; TRL's; with its padding.

    TRL counts the prompt with each response, and no padding. All pairs are padded together.
    """
    lengths = [(len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    return {
        "real": sum(map(sum, lengths)),
        "as_trl": sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in lengths),
        "padded": 2 * len(rows) * max(prompt + max(responses) for prompt, *responses in lengths),
    }


class StepTimer(TrainerCallback):
    """Wall seconds of every optimiser step. With `profiled`, the last of `steps` is profiled, and not timed."""

    def __init__(self, steps: int, *, profiled: bool) -> None:
        self.seconds: list[float] = []
        self.profiled_step = steps - 1 if profiled else None
        activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
        self.profiler = profile(activities=[activity])
        self.profiled_seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.profiled_step:
            self.profiler.start()
        self.started = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = now() - self.started
        if state.global_step - 1 == self.profiled_step:
            self.profiler.stop()
            self.profiled_seconds = seconds
        else:
            self.seconds.append(seconds)

    def result(self) -> dict[str, Any]:
        """The seconds of the steps, and the profile of the last."""
        profiled = (
            {} if self.profiled_step is None else {"profile": kernel_shares(self.profiler, self.profiled_seconds)}
        )
        return {"seconds_of_steps": self.seconds, **profiled}


KERNELS = {
    "attention": "attention|attn|flex|flash|fmha|sdpa|triton_tem",
    "matrix products": r"gemm|gemv|nvjet|cutlass|xmma|splitk|\b(mm|addmm|bmm|baddbmm|matmul|linear)\b",
    "optimiser": "adam|multi_tensor|foreach|clip_grad|linalg_vector_norm",
}
"""{kind: pattern of the names of its kernels, or on a CPU of torch's operations}; the first that fits counts."""


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name."""
    return next((kind for kind, names in KERNELS.items() if re.search(names, kernel, re.IGNORECASE)), "other")


def kernel_shares(profiler: profile, wall_seconds: float) -> dict[str, Any]:
    """Shares of the kernels' time by kind, the longest kernels, and the share of the wall time that they fill.

    On a CPU they are torch's operations.
    """
    device = DeviceType.CUDA if torch.cuda.is_available() else DeviceType.CPU
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        # The spans that torch annotates, such as an optimiser's step, hold kernels that are counted by themselves.
        if event.device_type == device and not event.is_user_annotation:
            time_us = event.self_device_time_total if device == DeviceType.CUDA else event.self_cpu_time_total
            spent[event.key] = spent.get(event.key, 0.0) + time_us
    total = sum(spent.values()) or math.nan
    shares = dict.fromkeys([*KERNELS, "other"], 0.0)
    for name, time_us in spent.items():
        shares[kind_of(name)] += time_us / total
    longest = sorted(spent.items(), key=lambda item: -item[1])[:15]
    return {
        "shares": shares,
        "busy": total / 1e6 / wall_seconds,
        "longest": [[name[:100], time_us / total] for name, time_us in longest],
    }


def now() -> float:
    """A clock that waits for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# --- variants ------------------------------------------------------------------------------------------------------


def build_model(job: argparse.Namespace) -> Any:
    """The job's model on its device; its random weights are the same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(**{"tie_word_embeddings": True, "max_position_embeddings": 2048, **SHAPES[job.shape]})
    with torch.device(job.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job.weights))


def ours(job: argparse.Namespace, *, p: str = "", lora: bool = False) -> dict[str, Any]:
    """DPO, or Sr-DPO with p "before" or "after" the prompt, through selfalign's trainer, reference values stored."""
    from selfalign.losses.preference import DPO, SrDPO
    from selfalign.models.batches import PairExample, SharedPrompt
    from selfalign.models.checkpoint import Policy, PolicyCheckpoint
    from selfalign.models.config import LoRA
    from selfalign.store.artifacts import StageOutput
    from selfalign.training.config import Optimization, TrainableWeights
    from selfalign.training.preference import Preference
    from selfalign.training.prepare import prepare
    from selfalign.training.reference import StoredReferences
    from selfalign.training.trainer import StepTrainer

    model = build_model(job)
    parameters = model.num_parameters()
    policy = Policy(model, tokenizer(), "")
    weights = TrainableWeights(dtype=job.weights, lora=LoRA(rank=16 if lora else 0), seed=0)
    prepare(policy, PolicyCheckpoint(Path(job.shape)), weights, 0.0)

    # About what the untrained policy gives, so that gradients are of usual size: vanishing ones are slow on a CPU.
    nats = math.log(model.config.vocab_size)

    def group(name: str, prompt: list[int], row: dict[str, list[int]]) -> SharedPrompt:
        return SharedPrompt(
            id=name, prompt=prompt, responses=[row["chosen_ids"], row["rejected_ids"]], num_context_tokens=[0, 0]
        )

    def logps(row: dict[str, list[int]]) -> list[float]:
        return [-nats * len(row["chosen_ids"]), -nats * len(row["rejected_ids"])]

    def augmented(row: dict[str, list[int]]) -> list[int]:
        return row["p_ids"] + row["prompt_ids"] if p == "before" else row["prompt_ids"] + row["p_ids"]

    rows = draw_pairs(job.data, model.config.vocab_size, 0)
    examples = [
        PairExample(
            plain=group(str(n), row["prompt_ids"], row),
            augmented=group(str(n), augmented(row), row) if p else None,
            reference=logps(row),
            augmented_reference=logps(row) if p else [],
        )
        for n, row in enumerate(rows)
    ]
    loss = SrDPO(beta=BETA, lam=LAM) if p else DPO(beta=BETA)
    optimization = Optimization(
        learning_rate=1e-6,
        schedule="constant",
        epochs=-(-job.steps * job.pairs // job.data),
        batch_size=job.pairs,
        microbatch_tokens=job.batch_tokens,
        dtype=job.dtype,
        checkpoint_steps=1 << 30,
    )
    with tempfile.TemporaryDirectory() as folder:
        out = StageOutput(Path(folder), "step", lambda row: None)
        objective = Preference(loss, StoredReferences(), starts_as_reference=False, dtype=job.dtype, reuses=True)
        trainer = StepTrainer(policy, examples, objective, optimization, out, weights)
        timer = StepTimer(job.steps, profiled=job.profile)
        trainer.add_callback(timer)
        trainer.run()
    return {"parameters": parameters, **timer.result()}


def trl(
    job: argparse.Namespace, *, checkpointing: bool, precomputed: bool, head: bool = False, refined: bool = False,
    lora: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """TRL's DPOTrainer; `head` scores response positions only, as it does by itself on a GPU with Triton."""
    import trl.trainer.utils
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    if head:
        trl.trainer.utils._use_triton = lambda device: True  # pyright: ignore[reportPrivateImportUsage]
    model = build_model(job)
    parameters = model.num_parameters()
    rows = draw_pairs(job.data, model.config.vocab_size, 0)

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    class NaiveSrDPO(Tokenised):
        """Two more padded passes, of the policy and of the reference given p⊕x, both without gradient."""

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> torch.Tensor:
            augmented = inputs.pop("augmented")
            h = self.difference(model, inputs)
            with torch.no_grad():
                reference = self.difference(self.ref_model, inputs)
                delta = BETA * (self.difference(model, augmented) - self.difference(self.ref_model, augmented))
            return -torch.nn.functional.logsigmoid(BETA * (h - reference) - LAM * delta).mean()

        def difference(self, model: Any, inputs: Any) -> torch.Tensor:
            inputs = dict(inputs)
            labels = inputs["input_ids"].masked_fill(inputs.pop("completion_mask") == 0, -100)
            logps = model(**inputs, labels=labels, fused_lm_head=True, use_cache=False).log_probs.sum(1)
            chosen, rejected = logps.chunk(2)
            return chosen - rejected

    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            beta=BETA,
            per_device_train_batch_size=job.trl_pairs or job.pairs,
            gradient_accumulation_steps=job.pairs // (job.trl_pairs or job.pairs),
            max_steps=job.steps,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            bf16=job.dtype == "bfloat16",
            activation_checkpointing=checkpointing,
            precompute_ref_log_probs=precomputed,
            max_length=None,
            use_cpu=job.device == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = (NaiveSrDPO if refined else Tokenised)(
            model=model,
            ref_model=None if precomputed or lora else copy.deepcopy(model),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if lora else None,
        )
        if refined:
            plain = trainer.data_collator

            def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
                behind_p = [{**row, "prompt_ids": row["p_ids"] + row["prompt_ids"]} for row in examples]
                return {**plain(examples), "augmented": plain(behind_p)}

            trainer.data_collator = collate
        timer = StepTimer(job.steps, profiled=job.profile)
        trainer.add_callback(timer)
        trainer.train()
    return {"parameters": parameters, **timer.result()}


VARIANTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "trl": lambda job: trl(job, checkpointing=True, precomputed=False),
    "trl_best": lambda job: trl(job, checkpointing=False, precomputed=True),
    "trl_best_head": lambda job: trl(job, checkpointing=False, precomputed=True, head=True),
    "dpo": ours,
    "trl_naive_sr_dpo": lambda job: trl(job, checkpointing=True, precomputed=False, refined=True),
    "sr_dpo": lambda job: ours(job, p="before"),
    "sr_dpo_after": lambda job: ours(job, p="after"),
    "trl_lora": lambda job: trl(job, checkpointing=True, precomputed=False, lora=True),
    "trl_best_lora": lambda job: trl(job, checkpointing=False, precomputed=True, lora=True),
    "dpo_lora": lambda job: ours(job, lora=True),
}
RATIOS = [
    ("DPO against TRL", "trl", "dpo"),
    ("DPO against TRL, no checkpointing, reference precomputed", "trl_best", "dpo"),
    ("DPO against the same with an efficient head", "trl_best_head", "dpo"),
    ("Sr-DPO against naive Sr-DPO on TRL", "trl_naive_sr_dpo", "sr_dpo"),
    ("DPO with LoRA against TRL with LoRA", "trl_lora", "dpo_lora"),
    ("DPO with LoRA against TRL with LoRA, no checkpointing, reference precomputed", "trl_best_lora", "dpo_lora"),
    ("Sr-DPO against our own DPO (time)", "sr_dpo", "dpo"),
    ("Sr-DPO with p after the prompt against our own DPO (time)", "sr_dpo_after", "dpo"),
]
"""(what, the slower, the faster): seconds of the first over seconds of the second."""


def tokenizer() -> Any:
    """Any tokenizer with a padding token; the pairs are token ids already."""
    from selfalign.models.builtin import BUILDERS

    return BUILDERS["random:tiny"]()[1]


# --- measuring -----------------------------------------------------------------------------------------------------


def work(job: argparse.Namespace) -> dict[str, Any]:
    """One variant's turn, in this process."""
    from selfalign.training.trainer import peak_memory

    result = VARIANTS[job.worker](job)
    return {**result, "peak_gb": peak_memory(torch.device(job.device)) / 2**30}


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations a second of a large matrix product: the best of several, or of one that takes long."""
    size = 8192 if device == "cuda" else 1024  # A CPU without instructions for bfloat16 makes 1 GFLOP/s in it.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = now()
        torch.mm(a, b)
        best = min(best, now() - started)
        if best > 1:
            break
    return 2 * size**3 / best


def step_operations(shape: dict[str, Any], rows: list[dict[str, list[int]]]) -> float:
    """Operations a DPO step cannot do without: 6 a weight and token, the head at response tokens only."""
    h, f, kv = shape["hidden_size"], shape["intermediate_size"], shape["num_key_value_heads"]
    body = shape["num_hidden_layers"] * (h * h * (2 + 2 * kv / shape["num_attention_heads"]) + 3 * h * f)
    tokens = count_tokens(rows)["real"]
    responses = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    return 6 * (body * tokens + shape["vocab_size"] * h * responses)


def run_worker(job: argparse.Namespace, variant: str, data: int) -> dict[str, Any]:
    """One variant's turn, in a process of its own."""
    names = ("shape", "dtype", "weights", "pairs", "steps", "device", "batch_tokens", "trl_pairs")
    passed = {name: getattr(job, name) for name in names} | {"data": data, "worker": variant}
    options = [text for name, value in passed.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{variant}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(job: argparse.Namespace) -> dict[str, Any]:
    """All variants, in alternation; returns what is written to the JSON file."""
    shape = SHAPES[job.shape]
    turns: dict[str, list[dict[str, Any]]] = {variant: [] for variant in job.variants}
    for number in range(job.rounds):
        for variant in job.variants:
            turns[variant].append(run_worker(job, variant, job.pairs))
            print(f"round {number + 1} {variant}: {min(turns[variant][-1]['seconds_of_steps']):.2f} s", file=sys.stderr)
    growth = {n: run_worker(job, "dpo", n * job.pairs) for n in (1, 8)} if job.growth else {}
    seconds = {v: statistics.median(min(turn["seconds_of_steps"][1:]) for turn in runs) for v, runs in turns.items()}
    rows = draw_pairs(job.pairs, shape["vocab_size"], 0)
    tokens = count_tokens(rows)["real"]
    rate = matrix_rate(getattr(torch, job.dtype), job.device)
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(job.device),
        "settings": {name: getattr(job, name) for name in ("shape", "dtype", "weights", "pairs", "rounds", "steps")},
        "matrix_rate": rate,
        "variants": {
            variant: {
                "seconds": seconds[variant],
                "spread": [min(t["seconds_of_steps"][1:]) for t in runs],
                "pair_tokens_per_second": tokens / seconds[variant],
                "peak_gb": statistics.median(turn["peak_gb"] for turn in runs),
            }
            for variant, runs in turns.items()
        },
        "ratios": {name: seconds[a] / seconds[b] for name, a, b in RATIOS if a in seconds and b in seconds},
    }
    if "dpo" in seconds:
        result["share_of_matrix_rate"] = step_operations(shape, rows) / seconds["dpo"] / rate
    if growth:
        total = {n: sum(run["seconds_of_steps"]) for n, run in growth.items()}
        result["growth"] = {
            "seconds_8x_over_1x": total[8]
            / total[1]
            * len(growth[1]["seconds_of_steps"])
            / len(growth[8]["seconds_of_steps"])
            * 8,
            "memory_8x_over_1x": growth[8]["peak_gb"] / growth[1]["peak_gb"],
        }
    return result


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"name": name, "threads": torch.get_num_threads(), **versions("torch", "transformers", "trl")}


def versions(*distributions: str) -> dict[str, str]:
    """{distribution: its version} of those that are installed."""
    from selfalign.runs.provenance import installed_version

    return {name: version for name in distributions if (version := installed_version(name))}


def show(result: dict[str, Any]) -> None:
    """The result as tables."""
    print("| variant | seconds a step | pair tokens/s | peak GB |\n|---|---|---|---|")
    for name, row in result["variants"].items():
        spread = f"{min(row['spread']):.2f} to {max(row['spread']):.2f}"
        rate, peak = row["pair_tokens_per_second"], row["peak_gb"]
        print(f"| {name} | {row['seconds']:.2f} ({spread}) | {rate:.0f} | {peak:.2f} |")
    print("\n| ratio | |\n|---|---|")
    for name, value in result["ratios"].items():
        print(f"| {name} | {value:.2f} × |")
    for name in ("share_of_matrix_rate", "growth"):
        print(f"\n{name}: {result.get(name)}")


def main() -> None:
    """Parses the command line; a worker prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights")
    parser.add_argument("--pairs", type=int, default=4, help="pairs an optimiser step")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn; the first is not counted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens of one of our forward passes")
    parser.add_argument("--trl-pairs", type=int, default=0, help="pairs of one of TRL's forward passes; 0 takes all")
    parser.add_argument("--growth", action="store_true", help="also 1 and 8 times the data, one epoch each")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    job = parser.parse_args()
    if job.worker:
        job.data = job.data or job.pairs
        job.steps = max(job.steps, job.data // job.pairs)
        print(json.dumps(work(job)))
        return
    result = compare(job)
    show(result)
    if job.out:
        job.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
