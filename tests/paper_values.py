"""What the two papers give of each published study, key by key of its composed configuration, and what is ours.

Every key of a study is in exactly one table: the paper's with its value, or one of those that follow it. A new key
that is in none fails test_studies.py, so that whoever adds one has to say whose it is.
"""

from typing import Any

Table = dict[str, Any]


def words(text: str) -> tuple[str, ...]:
    """Keys, with spaces between them."""
    return tuple(text.split())


# --- Self-Rewarding Language Models, arXiv 2401.10020 ---------------------------------------------------------------

MT_BENCH_TEMPERATURES = {
    f"temperatures.{name}": value
    for value, names in {
        0.7: ("writing", "roleplay"),
        0.1: ("stem", "humanities"),
        0.0: ("extraction", "math", "coding", "reasoning"),
    }.items()
    for name in names
}
"""FastChat's, by category (arXiv 2306.05685)."""

MT_BENCH: Table = {
    "benchmark.mt_bench.questions": "packaged:mt_bench",
    "benchmark.mt_bench.references": "packaged:mt_bench",
    "benchmark.mt_bench.count": 0,
    **{f"benchmark.mt_bench.{name}": value for name, value in MT_BENCH_TEMPERATURES.items()},
}

SFT = {"learning_rate": 5.5e-6, "final_learning_rate": 1.1e-6, "schedule": "cosine", "batch_size": 16, "dropout": 0.1}
ALIGN = {"learning_rate": 1e-6, "final_learning_rate": 1e-7, "schedule": "cosine", "batch_size": 16, "dropout": 0.1}
"""Section 3.1.1, training details."""

LOOP: Table = {
    # Section 2, and 3.1: Llama 2 70B, M1 → M2 → M3, all weights, each against the model before.
    "iterations": 2,
    "model.path": "meta-llama/Llama-2-70b-hf",
    "model.lora.rank": 0,
    "train.reference_policy": "previous",
    "choices.data": "SelfRewarding",
    # Section 3.1.1, seed training data: 3,200 of Open Assistant; EFT that the SFT baseline writes, thinned.
    "data.seed_data.demonstrations": "OpenAssistant/oasst1",
    "data.seed_data.ranked": "OpenAssistant/oasst1",
    "data.seed_data.max_demonstrations": 3200,
    "data.seed_data.eft_source": "baseline",
    # Section 2.2 and 3.1.1: eight-shot by a fixed chat model, T .6, p .9, ROUGE-L .7; pairs of one iteration each.
    "data.instruct.model": "meta-llama/Llama-2-70b-chat-hf",
    "data.instruct.source": "",
    "data.instruct.seed_examples": 6,
    "data.instruct.generated_examples": 2,
    "data.instruct.max_rouge_l": 0.7,
    "data.instruct.sampling.temperature": 0.6,
    "data.instruct.sampling.top_p": 0.9,
    "data.accumulate_pairs": False,
    # N = 4 candidates, T .7, p .9.
    "data.respond.candidates": 4,
    "data.respond.sampling.temperature": 0.7,
    "data.respond.sampling.top_p": 0.9,
    # The same model judges, additive five points (figure 2), three samples drawn the same way.
    "choices.judge": "SampledScore",
    "judge.model": "self",
    "judge.min_score": 0,
    "judge.max_score": 5,
    "judge.num_samples": 3,
    "judge.sampling.temperature": 0.7,
    "judge.sampling.top_p": 0.9,
    **{f"train.sft.{name}": value for name, value in SFT.items()},
    # Section 3.1.2: 256 prompts head to head; AlpacaEval 2; MT-Bench; nine NLP sets.
    "evaluate.count": 256,
    **MT_BENCH,
    "benchmark.alpaca_eval.count": 0,
    **{
        f"benchmark.nlp_sets.tasks.{place}.name": name
        for place, name in enumerate(
            ["arc_easy", "arc_challenge", "hellaswag", "social_iqa", "piqa", "gsm8k", "mmlu", "openbookqa", "nq_open"]
        )
    },
}

BY_DPO: Table = {
    # Section 2.4 and 3.1.1: DPO with β .1 on the best against the worst, a tie drops the prompt; a checkpoint every 200
    # steps is compared on 253 prompts.
    "choices.loss": "DPO",
    "loss.beta": 0.1,
    "loss.label_smoothing": 0,
    "loss.nll_weight": 0,
    "loss.reduction": "sum",
    "choices.pair": "BestWorst",
    "pair.minimum_margin": 0,
    "pair.length_control": None,
    **{f"train.align.{name}": value for name, value in ALIGN.items()},
    "train.checkpoint_selection.interval_steps": 200,
    "train.checkpoint_selection.count": 253,
}

BY_POSITIVES: Table = {
    # Section 3.2, "positives only": perfect fives, M0 trained anew on all examples.
    "choices.loss": "PositiveSFT",
    "loss.init": "base",
    "choices.pair": "PositivesOnly",
    "pair.minimum_score": 5,
}

# --- Quality-aware self-refinement, arXiv 2405.21040 ----------------------------------------------------------------

QUALITY_AWARE: Table = {
    # Section 5.1: β .1, lr 5e-7, RMSprop, batch 64, 512 tokens, one epoch, the last checkpoint, against the SFT model.
    "iterations": 1,
    "model.lora.rank": 0,
    "choices.data": "Pairs",
    "data.count": 0,
    "data.seed_data.max_demonstrations": 0,
    "train.reference_policy": "previous",
    "train.align.learning_rate": 5e-7,
    "train.align.optimizer": "rmsprop",
    "train.align.batch_size": 64,
    "train.align.max_length": 512,
    "train.align.epochs": 1,
    "train.checkpoint_selection.interval_steps": 0,
    # λ of {.1, .3, .5, 1}; .5 wins most with Sr-DPO (figure). Δ is eq. 11, p before x.
    "choices.loss": "SrDPO",
    "loss.beta": 0.1,
    "loss.lam": 0.5,
    "loss.refinement.source": "prompted",
    "loss.refinement.scale": 100,
    "loss.lam_warmup": 0,
    "loss.refinement.place": "dialogue",
    "loss.refinement.normalise": "none",
    "loss.reduction": "sum",
    "loss.label_smoothing": 0,
    "loss.nll_weight": 0,
}

SET_UP_A: Table = QUALITY_AWARE | {
    # Pythia 2.8B, SFT on the chosen responses of HH-RLHF; MT-Bench and Vicuna-Bench, both orders (table 2). λ is chosen
    # on 50 held-out tuples: of the training set they would be what M1 is taught.
    "model.path": "EleutherAI/pythia-2.8b",
    "data.path": "Anthropic/hh-rlhf",
    "data.seed_data.demonstrations": "Anthropic/hh-rlhf",
    "data.seed_data.ranked": "",
    "evaluate.instructions": "",
    "evaluate.compare_benchmarks": True,
    "train.validation_pairs": 0,
    "evaluate.preference_pairs.count": 50,
    **MT_BENCH,
    "benchmark.vicuna_bench.references": "",
    "benchmark.vicuna_bench.count": 0,
    **{f"benchmark.vicuna_bench.{name}": value for name, value in MT_BENCH_TEMPERATURES.items()},
}  # fmt: skip

LEADERBOARD = [
    ("arc_challenge", 25, "acc_norm"), ("hellaswag", 10, "acc_norm"), ("winogrande", 5, "acc"), ("mmlu", 5, "acc"),
    ("truthfulqa_mc2", 0, "acc"), ("gsm8k", 5, "exact_match,strict-match"),
]  # fmt: skip
SET_UP_B: Table = QUALITY_AWARE | {
    # zephyr-7b-sft-full on UltraFeedback; the Open LLM Leaderboard and its average. λ is chosen on 50 held-out tuples.
    "train.validation_pairs": 50,
    "model.path": "alignment-handbook/zephyr-7b-sft-full",
    "data.path": "HuggingFaceH4/ultrafeedback_binarized:train_prefs",
    "data.seed_data.demonstrations": "",
    "data.seed_data.ranked": "",
    "evaluate.instructions": "",
    "benchmark.open_llm_leaderboard.average": True,
    **{
        f"benchmark.open_llm_leaderboard.tasks.{place}.{field}": value
        for place, task in enumerate(LEADERBOARD)
        for field, value in zip(("name", "num_fewshot", "metric"), task, strict=True)
    },
}

# --- the studies ------------------------------------------------------------------------------------------------------

PAPER: dict[str, Table] = {
    "self_rewarding": LOOP | BY_DPO,
    # Table 2 of 2401.10020: either prompt on the SFT baseline.
    "self_rewarding_judge_prompt": LOOP | BY_DPO | {"evaluate.sft_baseline": True},
    # Section 3.2: M1 is the SFT baseline.
    "self_rewarding_no_eft": LOOP | BY_DPO | {"data.seed_data.eft_source": "none"},
    "self_rewarding_positives": LOOP | BY_POSITIVES,
    "quality_aware_hh": SET_UP_A,
    "quality_aware_ultrafeedback": SET_UP_B,
    "quality_aware_lambda": SET_UP_A,
    "quality_aware_tuples": SET_UP_A,
    "quality_aware_scale": SET_UP_A,
    "quality_aware_controls": SET_UP_A,
    "quality_aware_beta": SET_UP_A,
}
"""Study → key → value, of the configuration before its sweep."""

YOURS = {
    "evaluate.instructions": "asked.jsonl",
    "train.checkpoint_selection.instructions": "validation.jsonl",
    "benchmark.alpaca_eval.reference_outputs": "outputs.json",
    "benchmark.vicuna_bench.questions": "question.jsonl",
}
"""Files that only the user has, by the key that names them."""

OURS = {
    "model": ("chat_template", "dtype"),
    "data.seed_data": ("max_ranked", "held_out_share", "max_score_imbalance"),
    "data.instruct": (
        "count", "prompts_per_batch", "min_words", "max_words", "keywords", "max_batches", "prompt",
        "sampling.max_new_tokens",
    ),
    "data.respond": ("sampling.max_new_tokens",),
    "judge": ("prompt", "max_failure_rate", "retries", "min_valid_samples", "sampling.max_new_tokens"),
    "pair": ("finished_only", "max_similarity", "minimum_pairs", "minimum_examples"),
    "loss.refinement": ("prompt", "constant", "negative_prompt"),
    "train.sft": (
        "learning_rate", "final_learning_rate", "schedule", "warmup_ratio", "optimizer", "weight_decay",
        "max_grad_norm", "epochs", "batch_size", "max_length", "loss_reduction", "dropout",
    ),
    "train.align": (
        "final_learning_rate", "schedule", "warmup_ratio", "optimizer", "weight_decay", "max_grad_norm", "epochs",
        "max_length", "loss_reduction", "dropout",
    ),
    "train": ("validation_pairs",),
    "train.checkpoint_selection": (
        "level", "head_to_head.prompt", "head_to_head.model", "head_to_head.debias_position",
        "head_to_head.verdict_tokens", "head_to_head.max_failure_rate", "sampling.temperature", "sampling.top_p",
        "sampling.max_new_tokens", "interval_steps", "count",
    ),
    "evaluate": (
        "judge", "head_to_head.prompt", "head_to_head.model", "head_to_head.debias_position", "head_to_head",
        "head_to_head.verdict_tokens", "head_to_head.max_failure_rate", "round_robin", "compare_benchmarks",
        "reference_outputs",
        "sft_baseline", "sampling.temperature", "sampling.top_p", "sampling.max_new_tokens", "preference_pairs.source",
        "preference_pairs.count", "preference_pairs.judge", "count",
    ),
    "benchmark.mt_bench": (
        "max_new_tokens", "judge.prompt", "judge.prompts", "judge.model", "judge.method", "judge.max_new_tokens",
        "judge.max_failure_rate",
    ),
    "benchmark.vicuna_bench": (
        "max_new_tokens", "judge.prompt", "judge.prompts", "judge.model", "judge.method", "judge.max_new_tokens",
        "judge.max_failure_rate",
    ),
    "benchmark.alpaca_eval": (
        "judge.prompt", "judge.model", "judge.debias_position", "judge.verdict_tokens", "judge.max_failure_rate",
        "sampling.temperature", "sampling.top_p", "sampling.max_new_tokens",
    ),
    "benchmark.nlp_sets": (
        "average", "apply_chat_template", "seed",
        *(f"tasks.{place}.{field}" for place in range(9) for field in ("metric", "num_fewshot")),
    ),
    "benchmark.open_llm_leaderboard": ("apply_chat_template", "seed"),
}  # fmt: skip
"""Keys whose values the papers do not give, in a study whose own table lacks them."""

WRITTEN_OUT = (
    *words("data.instruct.count data.instruct.min_words data.instruct.max_words data.instruct.keywords"),
    *words("data.instruct.prompts_per_batch data.instruct.max_batches data.instruct.sampling.max_new_tokens"),
    *words("data.respond.sampling.max_new_tokens data.seed_data.held_out_share data.seed_data.max_score_imbalance"),
    *words("judge.retries judge.min_valid_samples judge.max_failure_rate judge.sampling.max_new_tokens"),
    *words("pair.max_similarity pair.finished_only pair.minimum_pairs train.validation_pairs "
    "train.checkpoint_selection.level"),
    *(f"train.{stage}.{name}" for stage in ("sft", "align") for name in (
        "warmup_ratio", "optimizer", "weight_decay", "max_grad_norm", "epochs", "max_length",
    )),
    "train.sft.loss_reduction",
    *words("train.checkpoint_selection.head_to_head.model evaluate.head_to_head.model evaluate.judge"),
    *(f"{key}.sampling.{name}" for key in ("train.checkpoint_selection", "evaluate") for name in (
        "temperature", "top_p", "max_new_tokens",
    )),
    *words("benchmark.mt_bench.judge.model benchmark.mt_bench.judge.method benchmark.alpaca_eval.judge.model"),
)  # fmt: skip
"""Defaults of ours that a study of 2401.10020 rests on: they stand in its files, marked."""

TECHNICAL = (
    *words("name seed output_dir fresh sweep_metric dry_run price_per_hour hub.*"),
    *words("tracker.* engine.* choices.engine data.schema train.parallelism.*"),
    *words("model.revision model.quantization model.trust_remote_code model.lora.alpha model.lora.targets"),
    *words(
        "*.max_batch_tokens *.microbatch_tokens *.batch_size *.checkpoint_steps *.gradient_checkpointing "
        "train.*.dtype *.endpoint.*"
    ),
    *words(
        "train.reference_logprobs judge.degeneracy.* evaluate.bounds.* evaluate.instruments.* evaluate.truth "
        "evaluate.kl_to_m1"
    ),
    *words("benchmark.*.include_path benchmark.*.limit"),
    *words("model.size model.sizes *.router_loss_coefficient"),
    *words("model.chat_template_arguments model.thinking.* *.thought_tokens *.mask_thought"),
    *words("model.system_prompt data.seed_data.assistant_turns"),
    *words("data.replay.* data.distortion.*"),
    *words("at data.respond.writers data.seed_data.fine_tune data.meta_judge pair.consistency pair.consistent_with"),
)
"""Where and how fast it runs, what is only warned of, where it is logged, and what these studies do not have: thoughts,
a system prompt, demonstrations of several answers, and what came after their papers; `*` stands for anything."""

WITHOUT_EFFECT = {
    "data.path": ("judge.*", "pair.*", "choices.judge", "choices.pair", "data.seed_data.eft_source"),
    "loss.init": ("train.align.*", "train.checkpoint_selection.*"),
}
"""What a study with given pairs (it has `data.path`), or without alignment (it has `loss.init`), does not use."""

SIZES = (
    *words("name sweep_metric engine.* model.* data.* judge.* choices.judge choices.data evaluate.* benchmark*"),
    *(f"train.*.{name}" for name in (
        "learning_rate", "final_learning_rate", "schedule", "warmup_ratio", "optimizer", "epochs", "batch_size",
        "loss_reduction", "dropout", "max_length", "checkpoint_steps", "gradient_checkpointing",
    )),
    *words("train.checkpoint_selection.* train.validation_pairs pair.minimum_score"),
)  # fmt: skip
"""What a small version changes of its study: model, data, sizes, rates, who judges and what is measured."""
