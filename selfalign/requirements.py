"""What a run asks of M0, held against what M0 was found to be able to do, before anything is trained."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from selfalign.errors import SelfalignError
from selfalign.given import Given, SelfRewarding
from selfalign.judges.expected import ExpectedScore, score_tokens
from selfalign.judges.referee import Referee, verdict_tokens
from selfalign.losses import Positives
from selfalign.models import PolicyFiles
from selfalign.records import Demonstration, PreferencePair, Prompt, stream_records
from selfalign.store import Artefact

if TYPE_CHECKING:
    from selfalign.config import ExperimentConfig


def check_requirements(config: "ExperimentConfig", base: Artefact, given: Given) -> None:
    """Refuses a run that M0 cannot be taken through.

    Args:
        config: the experiment.
        base: M0; its counts tell what it can do.
        given: the run's data.

    Raises:
        SelfalignError: with everything that stands against it, a line each.
    """
    checks = (_lengths, _dropout, _quantisation, _conversations, _judges)
    problems = [problem for check in checks for problem in check(config, base, given)]
    if problems:
        raise SelfalignError("\n".join(problems))


def _lengths(config: "ExperimentConfig", base: Artefact, given: Given) -> Iterator[str]:
    context = base.counts["context"]
    for key, length in _used_lengths(config, given).items():
        if length > context:
            yield f"{key}.max_length={length} is above the model's context of {context} tokens: set it to that or less"


def _used_lengths(config: "ExperimentConfig", given: Given) -> dict[str, int]:
    """{setting: longest sequence} of the trainings there are."""
    positives = isinstance(config.loss, Positives)
    taught = given.seeds.counts["ift"] + given.seeds.counts["eft"] or positives
    used = {"sft": taught, "align": not positives}
    return {f"train.{name}": getattr(config.train, name).max_length for name, is_used in used.items() if is_used}


def _dropout(config: "ExperimentConfig", base: Artefact, given: Given) -> Iterator[str]:
    for key, optimization in (("train.sft", config.train.sft), ("train.align", config.train.align)):
        if optimization.dropout and not base.counts["dropout"]:
            yield f"{key}.dropout={optimization.dropout}: this model has no dropout that could be set: set it to 0"


def _quantisation(config: "ExperimentConfig", base: Artefact, given: Given) -> Iterator[str]:
    stored = PolicyFiles(base.path).quantization
    if stored and not config.model.lora.rank:
        yield (
            f"model.path: its weights are quantised ({stored['quantization']}), and model.lora.rank=0 asks to train "
            "them: set model.lora.rank, such as 16"
        )


def _conversations(config: "ExperimentConfig", base: Artefact, given: Given) -> Iterator[str]:
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
    elif not base.counts["system_turns"]:
        for name, prompt in _prompts(given):
            if isinstance(prompt, list) and prompt[0]["role"] == "system":
                yield (
                    f"record {name} has a system turn, which the model's chat template does not take: leave it out, or "
                    "give another template with model.chat_template=FILE"
                )
                return


def _prompts(given: Given) -> Iterator[tuple[str, Prompt]]:
    """(id, prompt) of what is trained or measured on."""
    kinds = ((given.seeds, "demonstrations", Demonstration), (given.pairs, "pairs", PreferencePair))
    for artefact, name, kind in (*kinds, (given.preferences, "pairs", PreferencePair)):
        if artefact is not None and (file := artefact.path / f"{name}.jsonl").stat().st_size:
            yield from ((record.id, record.prompt) for record in stream_records(file, kind))


def _judges(config: "ExperimentConfig", base: Artefact, given: Given) -> Iterator[str]:
    """Whether the run's own models can give scores and verdicts as single tokens."""
    tokenizer = PolicyFiles(base.path).load_tokenizer()
    own = ("self", "sft", "base")
    if not tokenizer.chat_template:
        return
    try:
        if isinstance(config.judge, ExpectedScore) and config.judge.model in own:
            score_tokens(tokenizer, config.judge.low, config.judge.high)
        for judge in (config.judge, config.evaluate.head_to_head):
            if isinstance(judge, Referee) and judge.model in own and not judge.endpoint.base_url:
                verdict_tokens(tokenizer, judge.key)
    except SelfalignError as error:
        yield str(error)
