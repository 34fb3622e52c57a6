"""What a run asks of M0, held against what M0 was found to be able to do, before anything is trained."""

from collections.abc import Callable, Iterator
from typing import Any

from selfalign.benchmarks.alpaca_eval import AlpacaEval
from selfalign.benchmarks.mt_bench import MTBench
from selfalign.config.data import SelfRewarding
from selfalign.config.experiment import ExperimentConfig
from selfalign.core.errors import SelfalignError
from selfalign.core.jsonl import stream_records
from selfalign.core.records import Demonstration, PreferencePair, Prompt
from selfalign.data.sources import as_prompt
from selfalign.data.thinking import PromptEnd
from selfalign.engines.protocol import Sampling
from selfalign.judges.comparator import PairwiseComparator, verdict_tokens
from selfalign.judges.expected import ExpectedScore, score_tokens
from selfalign.judges.protocol import OWN_MODELS, asks_a_server
from selfalign.judges.written import WrittenScore
from selfalign.losses.protocol import Offset, augmentation_of
from selfalign.models.batches import score_gap
from selfalign.models.chat_template import QUESTION, markers_of, render_prompt
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt, plain_ids
from selfalign.pipeline.inputs import RunInputs
from selfalign.pipeline.models import judges_of
from selfalign.stages.seed_data import EFTSource
from selfalign.store.artifacts import Artifact
from selfalign.store.stage import PlannedArtifact
from selfalign.training.preference import lacks_score_gaps


def check_requirements(config: ExperimentConfig, base: Artifact, given: RunInputs) -> None:
    """Refuses a run that M0 cannot be taken through.

    Args:
        config: the experiment.
        base: M0; its counts tell what it can do.
        given: the run's data.

    Raises:
        SelfalignError: with everything that stands against it, a line each.
    """
    if isinstance(base, PlannedArtifact):
        return  # Of a plan: nothing has been read yet.
    of_model = (_lengths, _writing, _prompts_of_judges, _augmentation, _dropout, _quantisation, _judges)
    checks = (*of_model, _conversations, _thoughts, _scores)
    problems = [problem for check in checks for problem in check(config, base, given)]
    if problems:
        raise SelfalignError("\n".join(problems))


def _lengths(config: ExperimentConfig, base: Artifact, given: RunInputs) -> Iterator[str]:
    context = base.counts["context"]
    for key, length in _used_lengths(config, given).items():
        if length > context:
            yield f"{key}.max_length={length} is above the model's context of {context} tokens: set it to that or less"


def _used_lengths(config: ExperimentConfig, given: RunInputs) -> dict[str, int]:
    """{setting: longest sequence} of the trainings there are."""
    pairwise = config.loss.pairwise
    taught = given.seed_data.counts["ift"] + given.seed_data.counts["eft"] or not pairwise
    used = {"sft": taught, "align": pairwise}
    return {f"train.{name}": getattr(config.train, name).max_length for name, is_used in used.items() if is_used}


def _writing(config: ExperimentConfig, base: Artifact, given: RunInputs) -> Iterator[str]:
    """What the run's own models write leaves a prompt some room."""
    context = base.counts["context"]
    for key, sampling in _samplings(config).items():
        if sampling.longest >= context:
            yield f"{sampling.named(key)} leaves no token of the model's context of {context} for a prompt: lower it"


def _samplings(config: ExperimentConfig) -> dict[str, Sampling]:
    """{setting: how the run's own models write}."""
    data, choose = config.data, config.train.checkpoint_selection
    writers: dict[str, Any] = {}
    if isinstance(data, SelfRewarding):
        writers["data.respond"] = data.respond
        if not data.instruct.source and not data.instruct.fixed_writer:
            writers["data.instruct"] = data.instruct
    if config.evaluate.instructions:
        writers["evaluate"] = config.evaluate
    if choose.interval_steps:
        writers["train.checkpoint_selection"] = choose
    samplings: dict[str, Sampling] = {f"{key}.sampling": writer.sampling for key, writer in writers.items()}
    for name, benchmark in config.benchmark.items():
        if isinstance(benchmark, MTBench):
            samplings[f"benchmark.{name}"] = benchmark.sampling(0.0)
        elif isinstance(benchmark, AlpacaEval):
            samplings[f"benchmark.{name}.sampling"] = benchmark.sampling
    return samplings


def _prompts_of_judges(config: ExperimentConfig, base: Artifact, given: RunInputs) -> Iterator[str]:
    """The prompts of the run's own judges leave room for a response, and in examples of judging too."""
    context, seeds = base.counts["context"], config.data.seed_data
    tokenizer = PolicyCheckpoint(base.path).load_tokenizer()
    if not base.counts["chat_template"]:
        return
    for key, judge in _own_judges(config).items():
        asked, written = len(encode_prompt(tokenizer, asks(judge)("-", "-"))), writes(judge)
        if asked + written > context:
            yield (
                f"{key}.prompt takes {asked} tokens before any response, and the judge writes {written} more: over the "
                f"model's context of {context}"
            )
        taught = key == "judge" and seeds.ranked and seeds.eft_source != EFTSource.none
        if taught and asked >= (longest := config.train.sft.max_length):
            yield (
                f"judge.prompt takes {asked} tokens before any response, so no example of judging fits into "
                f"train.sft.max_length={longest}: raise it or shorten the prompt"
            )


def _augmentation(config: ExperimentConfig, base: Artifact, given: RunInputs) -> Iterator[str]:
    """p leaves room for x and a response."""
    p = augmentation_of(config.loss)
    if p is None:
        return
    tokenizer, context = PolicyCheckpoint(base.path).load_tokenizer(), base.counts["context"]
    if (asked := len(plain_ids(tokenizer, p.text(tokenizer).text))) >= context:
        yield (
            f"loss.refinement.prompt takes {asked} tokens, so no pair fits behind it into the model's context of "
            f"{context}: shorten it"
        )


def _dropout(config: ExperimentConfig, base: Artifact, given: RunInputs) -> Iterator[str]:
    for key, optimization in (("train.sft", config.train.sft), ("train.align", config.train.align)):
        if optimization.dropout and not base.counts["dropout"]:
            yield f"{key}.dropout={optimization.dropout}: this model has no dropout that could be set: set it to 0"


def _quantisation(config: ExperimentConfig, base: Artifact, given: RunInputs) -> Iterator[str]:
    stored = PolicyCheckpoint(base.path).quantization
    if stored and not config.model.lora.rank:
        yield (
            f"model.path: its weights are quantised ({stored['quantization']}), and model.lora.rank=0 asks to train "
            "them: set model.lora.rank, such as 16"
        )


def _conversations(config: ExperimentConfig, base: Artifact, given: RunInputs) -> Iterator[str]:
    """Whether the chat template takes what the data have."""
    if not base.counts["chat_template"]:
        asked = isinstance(config.data, SelfRewarding) or given.questions or config.benchmark
        record = None if asked else next((name for name, prompt in _prompts(given) if isinstance(prompt, list)), None)
        if asked or record:
            where = f"record {record}" if record else "the run"
            yield (
                f"{where} has conversations, and the model's tokenizer has no chat template: give one with "
                "model.chat_template=FILE (a Jinja file), or take model.chat_template=shipped:dialogue"
            )
        return
    if not base.counts["system_turns"]:
        yield from _refused_turns(given, "a system turn", lambda roles: "system" in roles)
    if not base.counts["earlier_turns"]:
        yield from _refused_turns(given, "turns before its question", lambda roles: roles.count("user") > 1)
        for name, benchmark in config.benchmark.items():
            if isinstance(benchmark, MTBench):
                yield f"benchmark.{name} asks twice, and the model's chat template takes no turns before a question"


def _refused_turns(given: RunInputs, what: str, found_in: Callable[[list[str]], bool]) -> Iterator[str]:
    """The first record that has turns which the chat template does not take."""
    for name, prompt in _prompts(given):
        if isinstance(prompt, list) and found_in([turn["role"] for turn in prompt]):
            yield (
                f"record {name} has {what}, which the model's chat template does not take: leave it out, or "
                "give another template with model.chat_template=FILE"
            )
            return


def _thoughts(config: ExperimentConfig, base: Artifact, given: RunInputs) -> Iterator[str]:
    """Thoughts have their place in prompts, and budgets their thoughts."""
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
    for record in _records(given):
        texts = [record.response] if isinstance(record, Demonstration) else [record.chosen, record.rejected]
        if isinstance(record.prompt, list) and any(text.lstrip().startswith(markers.open) for text in texts):
            yield (
                f"record {record.id} has an answer that begins with {markers.open}, and the model's chat template "
                "closes every thought before the answer: leave thoughts out, or have the template think with "
                "model.chat_template_arguments"
            )
            return


def _thought_budgets(config: ExperimentConfig) -> dict[str, int]:
    """{setting: most tokens of a thought} of what the run's own models write and judge."""
    samplings = {key: sampling.thought_tokens for key, sampling in _samplings(config).items()}
    judges = {key: getattr(judge, "thought_tokens", 0) for key, judge in _own_judges(config).items()}
    written = {
        f"{key}.sampling": judge.sampling.thought_tokens
        for key, judge in _own_judges(config).items()
        if isinstance(judge, WrittenScore)
    }
    return samplings | judges | written


def _scores(config: ExperimentConfig, base: Artifact, given: RunInputs) -> Iterator[str]:
    """Given pairs have the scores whose difference the loss takes."""
    if config.loss.offset is not Offset.score_gap or given.pairs is None:
        return
    pairs = stream_records(given.pairs.path / "pairs.jsonl", PreferencePair)
    if wrong := [pair.id for pair in pairs if not (score_gap(pair) or 0) > 0]:
        yield lacks_score_gaps(config.loss, wrong)


def _prompts(given: RunInputs) -> Iterator[tuple[str, Prompt]]:
    """(id, prompt) of what is trained or measured on."""
    return ((record.id, record.prompt) for record in _records(given))


def _records(given: RunInputs) -> Iterator[Demonstration | PreferencePair]:
    """What is trained or measured on."""
    kinds = ((given.seed_data, "demonstrations", Demonstration), (given.pairs, "pairs", PreferencePair))
    for artifact, name, kind in (*kinds, (given.preferences, "pairs", PreferencePair)):
        if artifact is not None and (file := artifact.path / f"{name}.jsonl").stat().st_size:
            yield from stream_records(file, kind)


def _judges(config: ExperimentConfig, base: Artifact, given: RunInputs) -> Iterator[str]:
    """Whether the run's own models can give scores and verdicts as single tokens."""
    tokenizer = PolicyCheckpoint(base.path).load_tokenizer()
    if not tokenizer.chat_template:
        return
    try:
        for judge in _own_judges(config).values():
            if isinstance(judge, ExpectedScore):
                score_tokens(tokenizer, judge.min_score, judge.max_score)
            if isinstance(judge, PairwiseComparator):
                verdict_tokens(tokenizer, judge.key)
    except SelfalignError as error:
        yield str(error)


def _own_judges(config: ExperimentConfig) -> dict[str, Any]:
    """{setting: judge} of those that are policies of the run."""
    judges = judges_of(config)
    return {key: one for key, one in judges.items() if not asks_a_server(one) and one.model in OWN_MODELS}


def asks(judge: Any) -> Callable[..., Prompt]:
    """What a judge is asked about an instruction and a response, in its form; two responses are alike."""
    if isinstance(judge, PairwiseComparator):
        return lambda instruction, response: judge.ask(instruction, response, response)
    return getattr(judge, "ask", lambda instruction, response: as_prompt(instruction + response))


def writes(judge: Any) -> int:
    """The most tokens of a judgement."""
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
