"""distorted_instructions: demonstrations + a policy → other instructions, and questions ranked by their answers.

A policy writes an instruction that looks like a demonstration's, and answers it. The answer is the worse one to the
demonstration's own instruction, so nobody has to rank answers (Self-Taught Evaluators, arXiv 2408.02666).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed, text_or_file
from selfalign.core.jsonl import chunks, read_records, stream_records, write_records
from selfalign.core.placeholders import check_template, fill
from selfalign.core.records import Demonstration, Instruction, Prompt, RankedAnswers, Response
from selfalign.data.questions import write_questions
from selfalign.data.rouge import rouge_l
from selfalign.data.text_filters import words_of
from selfalign.data.turns import as_prompt, as_text, compared, compared_prompt
from selfalign.engines.protocol import Completion, Engine, Generator, Request, Sampling, generate_batched
from selfalign.metrics import catalog
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.journal import Journal
from selfalign.store.stage import Size, amount, records_in, stage

PROMPT = (
    "Somebody gave an assistant this task:\n\n<task>\n{instruction}\n</task>\n\n"
    "Write a task that resembles it at first sight and stays with its subject, but asks for something clearly "
    "different, so that a perfect answer to yours would be a poor answer to theirs. Write the task only, not its "
    "answer."
)

OPENING = "Task:"
"""How every distorted instruction begins, so that nothing stands before it."""


@dataclass(kw_only=True, slots=True)
class DistortionConfig:
    """How worse answers to the instructions of demonstrations are made (Self-Taught Evaluators, arXiv 2408.02666).

    Attributes:
        count: the most instructions that are distorted, the first ones; 0 takes all. A conversation is one.
        prompt: asks for a distorted instruction, a text or "file:PATH", with the placeholder {instruction}; our own
            wording.
        max_rouge_l: a distorted instruction is dropped if its ROUGE-L F1 to the original one reaches this.
        sampling: how distorted instructions are sampled.
        answer_sampling: how the answers to them are sampled.
    """

    count: int = 0
    prompt: str = PROMPT
    max_rouge_l: float = 0.9
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=256))
    answer_sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        key = "data.distortion"
        self.prompt = text_or_file(self.prompt, f"{key}.prompt")
        check_template(self.prompt, f"{key}.prompt", ("instruction",))
        self.sampling.check(f"{key}.sampling")
        self.answer_sampling.check(f"{key}.answer_sampling")
        if self.sampling.thought_tokens:
            raise SelfalignError(
                f"{key}.sampling.thought_tokens has no effect: a task is continued where it begins, so nothing is "
                "thought before it; set it to 0"
            )
        if self.count < 0:
            raise SelfalignError(f"{key}.count must be 0 or more, got {self.count}")
        if not 0 < self.max_rouge_l <= 1:
            raise SelfalignError(f"{key}.max_rouge_l must be above 0 and at most 1, got {self.max_rouge_l}")

    def ask(self, instruction: str) -> Prompt:
        """Return the prompt that asks for a distorted instruction."""
        return as_prompt(fill(self.prompt, {"instruction": instruction}))


def size(*, config: DistortionConfig, seeds: Artifact, **others: object) -> Size:
    """Return the number of demonstrations that there are, or that are taken at most."""
    count = min(records_in(seeds, "demonstrations"), config.count or records_in(seeds, "demonstrations"))
    return Size(f"{amount(count)} instructions of demonstrations", {"instructions": count})


@stage(size=size, all_ranks=True)
def distorted_instructions(
    out: StageOutput,
    *,
    config: DistortionConfig,
    policy: Artifact,
    seeds: Artifact,
    held_out: list[Artifact],
    engine: Engine,
    seed: int,
) -> Counts:
    """Let a policy distort the instructions of demonstrations: in a conversation, its last turn.

    Args:
        out: receives instructions.jsonl, in which each has the id of its original.
        config: the prompt and the filters.
        policy: the policy that writes.
        seeds: demonstrations.jsonl, of which those for evaluation fine-tuning are left out.
        held_out: held-out instructions, of which none is distorted.
        engine: generates the texts.
        seed: combined with an instruction's id, it seeds the sampling of its distorted one.

    Raises:
        SelfalignError: there is no instruction to distort, or no distorted one is left.
    """
    drops = Counter[str]()
    originals = _originals(seeds, held_out, drops)[: config.count or None]
    if not originals:
        raise SelfalignError(
            f"{out.label}: data.seed_data.demonstrations has no instruction to distort (dropped: {dict(+drops)})"
        )
    kept = 0

    def written(generator: Generator, journal: Journal) -> Iterator[Instruction]:
        nonlocal kept
        for number, chunk in enumerate(chunks(originals)):
            for one, made in _distort(generator, journal, str(number), chunk, config, seed, drops):
                text = made.text.strip()
                if reason := _flaw(text, made, one, config.max_rouge_l):
                    drops[reason] += 1
                else:
                    kept += 1
                    yield _instruction(one, text)
        if not kept:
            raise SelfalignError(
                f"{out.label}: of {len(originals)} distorted instructions none is left (dropped: {dict(+drops)}). "
                "Raise data.distortion.sampling.max_new_tokens or data.distortion.max_rouge_l, or change "
                "data.distortion.prompt"
            )

    with engine.load(PolicyCheckpoint(policy.path)) as generator:
        with out.journal(len(originals), "instructions") as journal:
            write_records(out.path / "instructions.jsonl", written(generator, journal))
        return {
            catalog.WRITTEN.name: len(originals),
            catalog.KEPT.name: kept,
            "dropped": dict(sorted((+drops).items())),
            **generator.counts,
        }


def _originals(seeds: Artifact, held_out: list[Artifact], drops: Counter[str]) -> list[Demonstration]:
    """Return the demonstrations whose instructions can be distorted, the first of each conversation."""
    measured = {
        compared_prompt(record.prompt)
        for part in held_out
        for record in stream_records(part.path / "instructions.jsonl", Instruction)
    }
    demonstrations = read_records(seeds.path / "demonstrations.jsonl", Demonstration)
    first = {one.question or one.id: one for one in reversed(demonstrations) if one.source == "ift"}
    originals: list[Demonstration] = []
    for one in reversed(first.values()):
        if not _asks(one):
            drops["no_instruction"] += 1
        elif compared_prompt(one.prompt) in measured:
            drops["held_out"] += 1
        else:
            originals.append(one)
    return originals


def _asks(demonstration: Demonstration) -> bool:
    """Whether a demonstration answers a user's turn, with a text of its own."""
    prompt = demonstration.prompt
    begun = demonstration.prefill or demonstration.response_calls or not demonstration.response
    return not isinstance(prompt, str) and prompt[-1]["role"] == "user" and not begun


def _distort(
    generator: Generator,
    journal: Journal,
    name: str,
    originals: Sequence[Demonstration],
    config: DistortionConfig,
    seed: int,
    drops: Counter[str],
) -> Iterator[tuple[Demonstration, Completion]]:
    """Yield the originals whose prompts fit into the context, each with what the policy wrote."""
    room = generator.context - config.sampling.longest
    asked = [config.ask(_last_turn(one)) for one in originals]
    prompts = [encode_prompt(generator.tokenizer, prompt, OPENING) for prompt in asked]
    fitting = [(one, prompt) for one, prompt in zip(originals, prompts, strict=True) if len(prompt) <= room]
    drops["prompt_too_long"] += len(originals) - len(fitting)
    journal.advance(len(originals) - len(fitting))
    requests = [Request(prompt=prompt, seeds=[derive_seed(seed, one.id)]) for one, prompt in fitting]
    made = generate_batched(generator, requests, config.sampling, journal, name)
    for (one, _), [completion] in zip(fitting, made, strict=True):
        yield one, completion


def _flaw(text: str, made: Completion, original: Demonstration, max_rouge_l: float) -> str:
    """Return the reason to drop a distorted instruction, or an empty text."""
    if made.finish_reason.is_cut:
        return "cut"
    if not (words := words_of(text)):
        return "empty"
    return "similar" if rouge_l(words, words_of(_last_turn(original))) >= max_rouge_l else ""


def _last_turn(demonstration: Demonstration) -> str:
    prompt = demonstration.prompt
    assert not isinstance(prompt, str)
    return prompt[-1]["content"]


def _instruction(original: Demonstration, text: str) -> Instruction:
    assert not isinstance(original.prompt, str)
    turns = [*original.prompt[:-1], {**original.prompt[-1], "content": text}]
    return Instruction(id=original.id, text=as_text(turns), source="self", turns=turns if len(turns) > 1 else [])


def size_of_questions(*, instructions: Artifact, **others: object) -> Size:
    """Return the number of questions, with two answers each."""
    count = records_in(instructions, "instructions")
    return Size(f"{amount(count)} demonstrations beside worse answers", {"instructions": count, "responses": 2 * count})


@stage(size=size_of_questions)
def distorted_questions(out: StageOutput, *, seeds: Artifact, instructions: Artifact, responses: Artifact) -> Counts:
    """Rank demonstrations above the answers to their distorted instructions.

    Args:
        out: receives ranked.jsonl, instructions.jsonl and responses.jsonl, as `taught_questions` does.
        seeds: demonstrations.jsonl.
        instructions: instructions.jsonl of `distorted_instructions`.
        responses: responses.jsonl, one answer to each of them.

    Raises:
        SelfalignError: no answer is left.
    """
    demonstrations = read_records(seeds.path / "demonstrations.jsonl", Demonstration)
    originals = {one.id: one for one in demonstrations}
    drops, asked = Counter[str](), records_in(instructions, "instructions")
    questions: list[RankedAnswers] = []
    answers = read_records(responses.path / "responses.jsonl", Response)
    for answer in answers:
        original = originals[answer.instruction_id]
        if not answer.finished:
            drops["cut_answer"] += 1
        elif not words_of(answer.text):
            drops["empty_answer"] += 1
        elif compared(answer.text) == compared(original.response):
            drops["equal_answer"] += 1
        else:
            questions.append(_question(original, answer))
    drops["prompt_too_long"] = asked - len(answers)
    if not questions:
        raise SelfalignError(
            f"{out.label}: of {asked} answers to distorted instructions none is left (dropped: {dict(+drops)}): raise "
            "data.distortion.answer_sampling.max_new_tokens"
        )
    write_questions(out.path, questions)
    return {
        catalog.QUESTIONS.name: len(questions),
        catalog.RESPONSES.name: 2 * len(questions),
        "dropped": dict(sorted((+drops).items())),
    }


def _question(original: Demonstration, worse: Response) -> RankedAnswers:
    prompt = original.prompt
    assert not isinstance(prompt, str)
    return RankedAnswers(
        id=original.id,
        instruction=as_text(prompt),
        texts=[original.response, worse.text],
        ranks=[1, 2],
        scores=[],
        justifications=["", ""],
        turns=prompt if len(prompt) > 1 else [],
    )
