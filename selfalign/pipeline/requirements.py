"""Checks before training that M0 has the capabilities that a run needs."""

from collections.abc import Callable, Iterator
from typing import Any

from selfalign.benchmarks.alpaca_eval import AlpacaEval
from selfalign.benchmarks.arena_hard import ArenaHard
from selfalign.benchmarks.mt_bench import MTBench
from selfalign.config.data import SelfRewarding
from selfalign.config.experiment import ExperimentConfig
from selfalign.config.judges import judges_of
from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import stream_records
from selfalign.core.records import Demonstration, Instruction, PreferencePair, Prompt
from selfalign.data.rows import TOOLS
from selfalign.data.tails import is_plain, tails_of
from selfalign.data.thinking import PromptEnd
from selfalign.data.turns import as_prompt
from selfalign.engines.protocol import Sampling
from selfalign.judges.comparator import PairwiseComparator
from selfalign.judges.criteria import CriteriaSource, criteria_of, written_criteria
from selfalign.judges.expected import ExpectedScore
from selfalign.judges.protocol import OWN_MODELS, asks_a_server
from selfalign.judges.written import WrittenScore
from selfalign.losses.protocol import aligns, augmentation_of, cannot_train, misfit
from selfalign.models.batches import answers_of, encode_group, label_smoothing_of, scores_of
from selfalign.models.chat_template import QUESTION, markers_of, render_prompt
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt, plain_ids
from selfalign.pipeline.inputs import RunInputs
from selfalign.stages.seed_data import EFTSource
from selfalign.stages.sft import encode_demonstration
from selfalign.store.artifacts import Artifact
from selfalign.store.stage import PlannedArtifact


def check_requirements(config: ExperimentConfig, base: Artifact, inputs: RunInputs) -> None:
    """Check that M0 and the data allow the run.

    Args:
        config: the experiment.
        base: M0; its counts are its capabilities.
        inputs: the run's data.

    Raises:
        SelfalignError: a check failed. The message has one line for each problem.
    """
    if isinstance(base, PlannedArtifact):
        return  # In a plan nothing has been read yet.
    of_model = (_lengths, _writing, _prompts_of_judges, _augmentation, _dropout, _router_loss, _quantisation, _judges)
    checks = (*of_model, _criteria, _conversations, _turns_and_tools, _thoughts, _scores)
    configs = [config, *(config.in_iteration(int(start)) for start in config.at)]
    problems = [problem for own in configs for check in checks for problem in check(own, base, inputs)]
    if problems:
        raise SelfalignError("\n".join(dict.fromkeys(problems)))


def _lengths(config: ExperimentConfig, base: Artifact, inputs: RunInputs) -> Iterator[str]:
    context = base.counts["context"]
    for key, length in _used_lengths(config, inputs).items():
        if length > context:
            yield f"{key}.max_length={length} is above the model's context of {context} tokens: set it to that or less"


def _used_lengths(config: ExperimentConfig, inputs: RunInputs) -> dict[str, int]:
    """Return {setting: longest sequence in tokens} of the training stages of the run."""
    has_alignment = aligns(config.loss)
    taught = inputs.seed_data.counts["ift"] + inputs.seed_data.counts["eft"]
    has_sft = (config.data.seed_data.fine_tune and taught) or not has_alignment
    used = {"sft": has_sft, "align": has_alignment}
    return {f"train.{name}": getattr(config.train, name).max_length for name, is_used in used.items() if is_used}


def _writing(config: ExperimentConfig, base: Artifact, inputs: RunInputs) -> Iterator[str]:
    """Check that the tokens that models may write leave a part of the context for a prompt."""
    context = base.counts["context"]
    for key, sampling in _samplings(config).items():
        if sampling.longest >= context:
            yield f"{sampling.named(key)} leaves no token of the model's context of {context} for a prompt: lower it"


def _samplings(config: ExperimentConfig) -> dict[str, Sampling]:
    """Return {setting: how the run's own models write}."""
    data, selection = config.data, config.train.checkpoint_selection
    writers: dict[str, Any] = {}
    if isinstance(data, SelfRewarding):
        writers["data.respond"] = data.respond
        if not data.instruct.source and not data.instruct.fixed_writer:
            writers["data.instruct"] = data.instruct
    if data.seed_data.eft_source == EFTSource.synthetic:
        writers["data.distortion"] = data.distortion
    if config.evaluate.instructions:
        writers["evaluate"] = config.evaluate
    if selection.interval_steps:
        writers["train.checkpoint_selection"] = selection
    samplings: dict[str, Sampling] = {f"{key}.sampling": writer.sampling for key, writer in writers.items()}
    for key, judge in judges_of(config).items():
        criteria = written_criteria(judge)
        if criteria is not None and (criteria.model != "judge" or judge.model in OWN_MODELS):
            samplings[f"{key}.criteria.sampling"] = criteria.sampling
    if "data.distortion" in writers:
        samplings["data.distortion.answer_sampling"] = data.distortion.answer_sampling
    for name, benchmark in config.benchmark.items():
        if isinstance(benchmark, MTBench):
            samplings[f"benchmark.{name}"] = benchmark.sampling(0.0)
        elif isinstance(benchmark, AlpacaEval | ArenaHard):
            samplings[f"benchmark.{name}.sampling"] = benchmark.sampling
    return samplings


def _prompts_of_judges(config: ExperimentConfig, base: Artifact, inputs: RunInputs) -> Iterator[str]:
    """Check that the prompts of the run's own judges fit into the context, and those of EFT into training."""
    context, seeds = base.counts["context"], config.data.seed_data
    tokenizer = PolicyCheckpoint(base.path).load_tokenizer()
    if not base.counts["chat_template"]:
        return
    for key, judge in _own_judges(config).items():
        prompt, written = len(encode_prompt(tokenizer, judge_prompt(judge)("-", "-"))), max_judgement_tokens(judge)
        if prompt + written > context:
            yield (
                f"{key}.prompt takes {prompt} tokens before any response, and the judge writes up to {written} more: "
                f"over the model's context of {context} tokens. Shorten the prompt"
            )
        uses_eft = key == "judge" and seeds.teaches_judging
        if uses_eft and prompt >= (longest := config.train.sft.max_length):
            yield (
                f"judge.prompt takes {prompt} tokens before any response, so no EFT example fits into "
                f"train.sft.max_length={longest}: raise it or shorten the prompt"
            )


def _augmentation(config: ExperimentConfig, base: Artifact, inputs: RunInputs) -> Iterator[str]:
    """Check that p leaves a part of the context for x and a response, and that prompts have the turns that it needs."""
    p = augmentation_of(config.loss)
    if p is None:
        return
    tokenizer, context = PolicyCheckpoint(base.path).load_tokenizer(), base.counts["context"]
    for key, one in (("prompt", p.text(tokenizer)), ("negative_prompt", p.negative())):
        if one is not None and (length := len(plain_ids(tokenizer, one.text))) >= context:
            yield (
                f"loss.refinement.{key} takes {length} tokens, so no pair fits after it into the model's context of "
                f"{context} tokens: shorten it"
            )
    if p.place not in ("system", "after"):
        return
    if p.place == "system" and base.counts["chat_template"] and not base.counts["system_turns"]:
        yield (
            "loss.refinement.place=system, but the model's chat template accepts no system turn: set another place, or "
            "give another template with model.chat_template=FILE"
        )
    if inputs.pairs is None:
        return
    pairs = stream_records(inputs.pairs.path / "pairs.jsonl", PreferencePair)
    if text := next((pair.id for pair in pairs if isinstance(pair.prompt, str)), None):
        yield (
            f"record {text}: loss.refinement.place={p.place} needs a prompt of turns, but the prompt is a text: set it "
            "to dialogue"
        )


def _dropout(config: ExperimentConfig, base: Artifact, inputs: RunInputs) -> Iterator[str]:
    for key, optimization in (("train.sft", config.train.sft), ("train.align", config.train.align)):
        if optimization.dropout and not base.counts["dropout"]:
            yield f"{key}.dropout={optimization.dropout}, but this model has no dropout layers: set it to 0"


def _router_loss(config: ExperimentConfig, base: Artifact, inputs: RunInputs) -> Iterator[str]:
    for key, optimization in (("train.sft", config.train.sft), ("train.align", config.train.align)):
        if optimization.router_loss_coefficient and not base.counts["has_router_loss"]:
            yield (
                f"{key}.router_loss_coefficient={optimization.router_loss_coefficient}, but this model has no experts "
                "with a load balancing loss: remove it"
            )


def _quantisation(config: ExperimentConfig, base: Artifact, inputs: RunInputs) -> Iterator[str]:
    stored = PolicyCheckpoint(base.path).quantization
    if stored and not config.model.lora.rank:
        yield (
            f"model.path: its weights are quantised ({stored['quantization']}), and model.lora.rank=0 would train all "
            "of them, which is impossible: set model.lora.rank=16, for example"
        )


def _conversations(config: ExperimentConfig, base: Artifact, inputs: RunInputs) -> Iterator[str]:
    """Check that the model has a chat template if one is needed, and that it accepts the turns of the data."""
    if not base.counts["chat_template"]:
        needed = isinstance(config.data, SelfRewarding) or inputs.questions or config.benchmark
        record = None if needed else next((name for name, prompt in _prompts(inputs) if isinstance(prompt, list)), None)
        if needed or record:
            where = f"record {record}" if record else "the run"
            yield (
                f"{where} has conversations, and the model's tokenizer has no chat template: give one with "
                "model.chat_template=FILE (a Jinja file), or take model.chat_template=shipped:dialogue"
            )
        return
    if not base.counts["system_turns"]:
        yield from _refused_turns(inputs, "a system turn", lambda roles: "system" in roles)
    if not base.counts["earlier_turns"]:
        yield from _refused_turns(inputs, "turns before its question", lambda roles: roles.count("user") > 1)
        for name, benchmark in config.benchmark.items():
            if isinstance(benchmark, MTBench):
                yield (
                    f"benchmark.{name} has conversations of two turns, but the model's chat template accepts no turns "
                    "before a question: give another template with model.chat_template=FILE"
                )


def _turns_and_tools(config: ExperimentConfig, base: Artifact, inputs: RunInputs) -> Iterator[str]:
    """Check that the chat template writes tools, and responses of several turns, as they are trained on."""
    if not base.counts["chat_template"]:
        return
    tokenizer = PolicyCheckpoint(base.path).load_tokenizer()
    try:
        for record in _records(inputs):
            with_tools = not isinstance(record.prompt, str) and any(
                turn["role"] == "tool" or turn.keys() & TOOLS for turn in record.prompt
            )
            if isinstance(record, PreferencePair) and (with_tools or not is_plain(record)):
                encode_group(tokenizer, record.id, record.prompt, answers_of(record))
            elif isinstance(record, Demonstration) and (with_tools or record.response_calls):
                encode_demonstration(tokenizer, record)
    except SelfalignError as error:
        yield str(error)


def _refused_turns(inputs: RunInputs, turns: str, has_turns: Callable[[list[str]], bool]) -> Iterator[str]:
    """Yield a problem if a record has turns that the chat template does not accept. It names the first record."""
    for name, prompt in _prompts(inputs):
        if isinstance(prompt, list) and has_turns([turn["role"] for turn in prompt]):
            yield (
                f"record {name} has {turns}, which the model's chat template does not accept: remove the record, or "
                "give another template with model.chat_template=FILE"
            )
            return


def _thoughts(config: ExperimentConfig, base: Artifact, inputs: RunInputs) -> Iterator[str]:
    """Check that budgets of thoughts have thoughts, and that responses with a thought suit the chat template."""
    tokenizer = PolicyCheckpoint(base.path).load_tokenizer()
    markers = markers_of(tokenizer)
    if markers is None:
        for key, budget in _thought_budgets(config).items():
            if budget:
                yield (
                    f"{key}.thought_tokens={budget} has no effect: the model's chat template marks no thoughts; set it "
                    "to 0, or say with model.thinking.open and model.thinking.close what is written around a thought"
                )
        return
    if not base.counts["chat_template"]:
        return
    if markers.prompt_end(render_prompt(tokenizer, QUESTION)) is not PromptEnd.CLOSED:
        return
    for record in _records(inputs):
        texts = [record.response] if isinstance(record, Demonstration) else [record.chosen, record.rejected]
        if isinstance(record.prompt, list) and any(text.lstrip().startswith(markers.open) for text in texts):
            yield (
                f"record {record.id} has a response that begins with {markers.open}, but the model's chat template "
                "closes every thought before the answer: remove the thoughts, or let the template think with "
                "model.chat_template_arguments"
            )
            return


def _thought_budgets(config: ExperimentConfig) -> dict[str, int]:
    """Return {setting: the most tokens of a thought} of what the run's own models write and judge."""
    samplings = {key: sampling.thought_tokens for key, sampling in _samplings(config).items()}
    judges = {key: getattr(judge, "thought_tokens", 0) for key, judge in _own_judges(config).items()}
    written = {
        f"{key}.sampling": judge.sampling.thought_tokens
        for key, judge in _own_judges(config).items()
        if isinstance(judge, WrittenScore)
    }
    return samplings | judges | written


def _scores(config: ExperimentConfig, base: Artifact, inputs: RunInputs) -> Iterator[str]:
    """Check that the loss can train on given pairs: that they have the scores that it needs, and nothing besides."""
    misfits: dict[str, list[str]] = {}
    for given in filter(None, (inputs.pairs, inputs.replay)):
        for pair in stream_records(given.path / "pairs.jsonl", PreferencePair):
            misfits.setdefault(misfit(config.loss, scores_of(pair), label_smoothing_of(pair)), []).append(pair.id)
    if message := cannot_train(config.loss, misfits):
        yield message


def _prompts(inputs: RunInputs) -> Iterator[tuple[str, Prompt]]:
    """Yield (id, prompt) of all given demonstrations and pairs, with the turns before the answers of pairs."""
    for record in _records(inputs):
        yield record.id, record.prompt
        if isinstance(record, PreferencePair) and not isinstance(record.prompt, str):
            yield from ((record.id, [*record.prompt, *tail.turns]) for tail in tails_of(record) if tail.turns)


def _records(inputs: RunInputs) -> Iterator[Demonstration | PreferencePair]:
    """Yield all given demonstrations and pairs, to train on or held out."""
    pairs = [(artifact, "pairs", PreferencePair) for artifact in (inputs.pairs, inputs.replay, inputs.preferences)]
    for artifact, name, kind in ((inputs.seed_data, "demonstrations", Demonstration), *pairs):
        file = None if artifact is None else artifact.path / f"{name}.jsonl"
        if file is not None and file.exists() and file.stat().st_size:
            yield from stream_records(file, kind)


def _judges(config: ExperimentConfig, base: Artifact, inputs: RunInputs) -> Iterator[str]:
    """Check that the model's tokenizer has single tokens for what the run's own judges read as scores."""
    tokenizer = PolicyCheckpoint(base.path).load_tokenizer()
    if not tokenizer.chat_template:
        return
    try:
        for judge in _own_judges(config).values():
            if check := getattr(judge, "check_tokenizer", None):
                check(tokenizer)
    except SelfalignError as error:
        yield str(error)


def _criteria(config: ExperimentConfig, base: Artifact, inputs: RunInputs) -> Iterator[str]:
    """Check that all instructions to be judged have criteria, if the judge takes those of the data."""
    criteria = criteria_of(config.judge)
    if criteria is None or criteria.source != CriteriaSource.given:
        return
    judged = {
        "data.instruct.source": inputs.instructions,
        "evaluate.instructions": inputs.questions,
        "data.seed_data.ranked": inputs.ranked,
    }
    for key, artifact in judged.items():
        records = stream_records(artifact.path / "instructions.jsonl", Instruction) if artifact else iter(())
        if lacking := next((record.id for record in records if not record.criteria), None):
            yield (
                f"judge.criteria.source=given, but record {lacking} of {key} has no criteria: add the field criteria "
                f"to its row, leave {key} empty, or set judge.criteria.source=written"
            )


def _own_judges(config: ExperimentConfig) -> dict[str, Any]:
    """Return {setting: judge} of the judges that are policies of the run."""
    judges = judges_of(config)
    return {key: judge for key, judge in judges.items() if not asks_a_server(judge) and judge.model in OWN_MODELS}


def judge_prompt(judge: Any) -> Callable[..., Prompt]:
    """Return a function from instruction and response to the judge's prompt. A comparator gets the response twice."""
    if isinstance(judge, PairwiseComparator):
        return lambda instruction, response: judge.ask(instruction, response, response)
    return getattr(judge, "ask", lambda instruction, response: as_prompt(instruction + response))


def max_judgement_tokens(judge: Any) -> int:
    """Return the most tokens that the judge writes for one judgement."""
    match judge:
        case WrittenScore():
            return judge.sampling.longest
        case ExpectedScore():
            return judge.thought_tokens + judge.rationale_tokens
        case PairwiseComparator() if asks_a_server(judge):
            return judge.thought_tokens + judge.verdict_tokens
        case PairwiseComparator():
            return judge.thought_tokens
        case _:
            return 0
