"""instruct: seed instructions + a policy or given instructions → new instructions."""

import math
import random
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed, digest_text
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.placeholders import check_template
from selfalign.core.records import Demonstration, FinishReason, Instruction
from selfalign.data.mixtures import data_source
from selfalign.data.rouge import RougeIndex
from selfalign.data.text_filters import Language, is_fragment, words_of
from selfalign.data.turns import compared_prompt, instruction_of
from selfalign.engines.protocol import Completion, Engine, Generator, Request, Sampling, generate_batched
from selfalign.metrics import catalog
from selfalign.metrics.summaries import instruction_statistics
from selfalign.models.builtin import BUILDERS
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import encode_prompt
from selfalign.store.artifacts import Artifact, Counts, StageOutput
from selfalign.store.stage import Size, stage

PROMPT = (
    "Here are tasks that people gave to an assistant. Add one new task on a subject that none of them has. "
    "It should be clear, complete in itself and answerable in a few sentences. Write the task only, not its answer."
)
KEYWORDS = ("image", "picture", "photo", "graph", "diagram", "video", "audio", "draw", "plot", "file", "map")
DEMONSTRATIONS = "demonstrations"
"""The source of instructions that are the prompts of `data.seed_data.demonstrations`."""

OWN_WRITERS = ("self", "sft", "base")

PROMPTS_EACH = 4
"""The most prompts for each wanted instruction. A prompt asks for one task. In the demo, 28 instructions were kept of
48 prompts (0.58 a prompt) and 28 of 32 (0.88 a prompt), so a model that needs more than four hardly writes any."""

LEAST_BATCHES = 10
"""Batches that are always allowed, because chance can spoil most of a few prompts."""


@dataclass(kw_only=True, slots=True)
class InstructConfig:
    """Self-instruction creation, arXiv 2401.10020, section 2.2, after Self-Instruct (arXiv 2212.10560).

    Attributes:
        count: number of new instructions to keep in each iteration.
        model: the model that writes: "self" (M_t), "sft" (M1), "base" (M0), or a fixed model as in the paper's main
            run, which is a folder, hub id or packaged model as in `model.path`.
        source: a data source from which instructions are taken in its order, instead of generated; empty generates.
            "demonstrations" draws `count` prompts of `data.seed_data.demonstrations` in each iteration.
        seed_examples: few-shot examples from the seeds.
        generated_examples: few-shot examples from the generated instructions. Seeds replace them until there are any.
        prompts_per_batch: number of prompts in a batch. Prompts of a batch do not see one another's results. The
            processes of a run share a batch, so many processes need a larger one.
        max_rouge_l: an instruction is dropped if its ROUGE-L F1 to a seed, kept or held-out instruction reaches this.
        min_words: shorter instructions are dropped.
        max_words: longer instructions are dropped.
        keywords: instructions with one of these words or phrases, or its plural, are dropped, because they ask for what
            a language model cannot see or make. Capitals and punctuation do not count.
        max_batches: the run stops with an error if this many batches gave too few instructions. 0 allows
            `PROMPTS_EACH` prompts for each instruction of `count`, and at least `LEAST_BATCHES` batches.
        prompt: the text before the few-shot examples; our own wording.
        sampling: how instructions are sampled.
    """

    count: int = 64
    model: str = "self"
    source: Any = ""
    seed_examples: int = 6
    generated_examples: int = 2
    prompts_per_batch: int = 32
    max_rouge_l: float = 0.7
    min_words: int = 4
    max_words: int = 150
    keywords: list[str] = field(default_factory=lambda: list(KEYWORDS))
    max_batches: int = 0
    prompt: str = PROMPT
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.6, max_new_tokens=128))

    def __post_init__(self) -> None:
        self.source = data_source(self.source, "data.instruct.source")
        self.sampling.check("data.instruct.sampling")
        if self.sampling.thought_tokens:
            raise SelfalignError(
                "data.instruct.sampling.thought_tokens has no effect: a task is continued where it begins, so nothing "
                "is thought before it; set it to 0"
            )
        check_template(self.prompt, "data.instruct.prompt", ())
        if wordless := [keyword for keyword in self.keywords if not words_of(keyword)]:
            raise SelfalignError(f"data.instruct.keywords: {wordless[0]!r} has no word, so no instruction has it")
        if self.fixed_writer and "/" not in self.model and self.model not in BUILDERS:
            raise SelfalignError(
                f"data.instruct.model must be {', '.join(OWN_WRITERS)}, a model's folder (./NAME), a hub id "
                f"(owner/name) or one of {', '.join(BUILDERS)}; got {self.model!r}"
            )
        if self.source and self.model != "self":
            raise SelfalignError(
                f"data.instruct.model={self.model} and data.instruct.source exclude each other: set only one of them"
            )
        for name in ("count", "seed_examples", "prompts_per_batch", "min_words"):
            if getattr(self, name) < 1:
                raise SelfalignError(f"data.instruct.{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("generated_examples", "max_batches"):
            if getattr(self, name) < 0:
                raise SelfalignError(f"data.instruct.{name} must be 0 or more, got {getattr(self, name)}")
        if self.max_words < self.min_words:
            raise SelfalignError(f"data.instruct.max_words is {self.max_words}, below min_words={self.min_words}")
        if not 0 < self.max_rouge_l <= 1:
            raise SelfalignError(f"data.instruct.max_rouge_l must be above 0 and at most 1, got {self.max_rouge_l}")
        if not self.source and self.most_batches * self.prompts_per_batch < self.count:
            most, least = self.max_batches * self.prompts_per_batch, math.ceil(self.count / self.prompts_per_batch)
            raise SelfalignError(
                f"data.instruct.count={self.count}, but data.instruct.max_batches={self.max_batches} of "
                f"data.instruct.prompts_per_batch={self.prompts_per_batch} ask for {most} tasks at most: set "
                f"max_batches to 0, which allows enough, or above {least}, because some tasks are dropped"
            )

    @property
    def most_batches(self) -> int:
        """The number of batches after which the run stops with an error."""
        return self.max_batches or max(LEAST_BATCHES, math.ceil(PROMPTS_EACH * self.count / self.prompts_per_batch))

    @property
    def fixed_writer(self) -> bool:
        """Whether the instructions are written by a model from outside the run."""
        return self.model not in OWN_WRITERS


def phrases(config: InstructConfig) -> list[str]:
    """Return the keywords as the words of a text are compared, in small letters without punctuation."""
    return [" ".join(words_of(keyword)) for keyword in config.keywords]


@dataclass(slots=True)
class Pool:
    """All known instructions. It keeps new ones that pass the filters and counts the dropped ones by reason.

    Attributes:
        config: the thresholds of the filters.
        seeds: instructions that M1 was trained on.
        earlier: instructions of earlier iterations.
        held_out: instructions that no training may see, and the user's turns in them.
        held_out_whole: the same without these turns.
        kept: new instructions that passed.
        dropped: {reason: number of dropped instructions}.
        highest: each kept instruction's highest ROUGE-L F1 to the instructions known before it.
    """

    config: InstructConfig
    seeds: list[str]
    earlier: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    held_out_whole: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    highest: list[float] = field(default_factory=list)
    _keywords: list[str] = field(init=False)
    _language: Language = field(init=False)
    _known: RougeIndex = field(init=False)
    _known_seeds: RougeIndex = field(init=False)
    _known_held_out: RougeIndex = field(init=False)
    _known_held_out_whole: RougeIndex = field(init=False)

    def __post_init__(self) -> None:
        self._keywords = phrases(self.config)
        self._language = Language.of(self.seeds)
        self._known = RougeIndex.of(self.seeds + self.earlier)
        self._known_seeds = RougeIndex.of(self.seeds)
        self._known_held_out = RougeIndex.of(self.held_out)
        self._known_held_out_whole = RougeIndex.of(self.held_out_whole)

    @property
    def full(self) -> bool:
        """Whether `count` new instructions are kept."""
        return len(self.kept) == self.config.count

    def offer(self, text: str, shown: Collection[str] = (), turns: Collection[str] = ()) -> bool:
        """Keep an instruction if it passes the filters, or else count the reason. Return whether it was kept.

        Args:
            text: the instruction.
            shown: the few-shot examples of its prompt.
            turns: the user's turns, if it is a conversation.
        """
        words = words_of(text)
        reason = "surplus" if self.full else self._flaw(text, words) or self._copied(words, shown, turns)
        highest = 0.0 if reason else self._known.highest(words)
        if not reason and highest >= self.config.max_rouge_l:
            reason = "similar"
        if reason:
            self.dropped[reason] += 1
            return False
        self.kept.append(text)
        self.highest.append(highest)
        self._known.add(words)
        return True

    def counts(self) -> Counts:
        """Return the numbers of kept and dropped instructions, and statistics of the kept ones."""
        return {
            catalog.KEPT.name: len(self.kept),
            "dropped": dict(sorted((+self.dropped).items())),
            **instruction_statistics([words_of(text) for text in self.kept], self.highest),
        }

    def _flaw(self, text: str, words: list[str]) -> str | None:
        """Return the reason to drop a text by itself, or None."""
        if not words:
            return "empty"
        if is_fragment(text):
            return "fragment"
        if len(words) < self.config.min_words:
            return "too_short"
        if len(words) > self.config.max_words:
            return "too_long"
        said = f" {' '.join(words)} "
        if any(f" {keyword}{plural} " in said for keyword in self._keywords for plural in ("", "s")):
            return "keyword"
        return "language" if self._language.differs(text) else None

    def _copied(self, words: list[str], shown: Collection[str], turns: Collection[str]) -> str | None:
        """Return the reason to drop a text because it copies or resembles a known instruction, or None."""
        asked = (self._known_held_out_whole.highest(words_of(turn)) for turn in turns)
        if max(self._known_held_out.highest(words), *asked, 0.0) >= self.config.max_rouge_l:
            return "held_out"
        if words in map(words_of, shown):
            return "copy_of_demonstration"
        if words in self._known_seeds:
            return "copy_of_seed"
        return "copy_of_kept" if words in self._known else None


def size(*, config: InstructConfig, policy: Artifact, **others: object) -> Size:
    """Return the number of instructions to keep."""
    return Size(f"{config.count} instructions, written by {policy.key}", {"instructions": config.count})


@stage(size=size, all_ranks=True)
def instruct(
    out: StageOutput,
    *,
    config: InstructConfig,
    policy: Artifact,
    seeds: Artifact,
    earlier: list[Artifact],
    held_out: list[Artifact],
    engine: Engine,
    seed: int,
) -> Counts:
    """Generate instructions with a policy until `count` have passed the filters.

    Args:
        out: receives instructions.jsonl.
        config: sizes and filters.
        policy: the policy that writes.
        seeds: demonstrations.jsonl; its instructions are the few-shot examples.
        earlier: instructions of earlier iterations; new ones must differ from them.
        held_out: held-out instructions; new ones must differ from them.
        engine: generates the texts.
        seed: seeds the choice of examples and the sampling of tokens.

    Raises:
        SelfalignError: `max_batches` gave too few instructions.
    """
    pool = _pool(config, seeds, earlier, held_out)
    if len(pool.seeds) < config.seed_examples:
        raise SelfalignError(
            f"data.instruct.seed_examples={config.seed_examples}, but there are {len(pool.seeds)} IFT seeds: "
            "lower it or give more data.seed_data.demonstrations"
        )
    written = batch = 0
    with engine.load(PolicyCheckpoint(policy.path)) as generator, out.journal(config.count, "instructions") as journal:
        while not pool.full and batch < config.most_batches:
            shown = [_draw(pool, derive_seed(seed, batch, index)) for index in range(config.prompts_per_batch)]
            requests = _requests(generator, config, shown, seed, batch)
            made = generate_batched(generator, requests, config.sampling, journal, str(batch), size=0)
            for examples, [completion] in zip(shown, made, strict=True):
                texts, cut = split_tasks(completion)
                journal.advance(sum(pool.offer(text, examples) for text in texts))
                pool.dropped["truncated"] += cut
                written += len(texts) + cut
            batch += 1
    if not pool.full:
        raise SelfalignError(
            f"{out.label}: {len(pool.kept)} of {config.count} instructions after {batch} batches "
            f"(dropped: {dict(+pool.dropped)}). Raise data.instruct.max_batches above {config.most_batches} or relax "
            "the filters"
        )
    # Ids come from texts alone, so that the seeds derived from ids do not depend on the rounding of weights.
    records = [Instruction(id=digest_text(text)[:16], text=text, source="self") for text in pool.kept]
    write_records(out.path / "instructions.jsonl", records)
    return {catalog.WRITTEN.name: written, catalog.BATCHES.name: batch, **pool.counts(), **generator.counts}


def size_of_given(*, config: InstructConfig, **others: object) -> Size:
    """Return the number of instructions to keep."""
    return Size(f"the next {config.count} of {config.source}", {"instructions": config.count})


@stage(size=size_of_given, given=True)
def given_instructions(
    out: StageOutput,
    *,
    config: InstructConfig,
    given: Artifact,
    seeds: Artifact,
    earlier: list[Artifact],
    held_out: list[Artifact],
) -> Counts:
    """Take the next given instructions until `count` have passed the filters.

    Args:
        out: receives instructions.jsonl.
        config: sizes and filters.
        given: instructions.jsonl with all given instructions. Reading starts after the last one that an earlier
            iteration took.
        seeds: demonstrations.jsonl; new instructions must differ from its prompts.
        earlier: instructions of earlier iterations; new ones must differ from them.
        held_out: held-out instructions; new ones must differ from them.

    Raises:
        SelfalignError: too few of the remaining instructions passed.
    """
    pool = _pool(config, seeds, earlier, held_out)
    records = _instructions(given)
    used = {record.id for artifact in earlier for record in _instructions(artifact)}
    start = max((position for position, record in enumerate(records, start=1) if record.id in used), default=0)
    kept: list[Instruction] = []
    read = 0
    for record in records[start:]:
        if pool.full:
            break
        read += 1
        if pool.offer(compared_prompt(record.prompt), turns=_user_turns(record)):
            kept.append(replace(record, source="given"))
    if not pool.full:
        raise SelfalignError(
            f"{out.label}: only {len(kept)} of {config.count} instructions passed the filters, of the {read} that are "
            f"left of the {len(records)} in data.instruct.source={config.source} (dropped: {dict(pool.dropped)}). Give "
            "more, lower data.instruct.count or relax the filters"
        )
    write_records(out.path / "instructions.jsonl", kept)
    return {catalog.WRITTEN.name: read, **pool.counts()}


def split_tasks(completion: Completion) -> tuple[list[str], int]:
    """Return the tasks in the completion of a "Task 9:" prompt, and how many the token limit cut (0 or 1)."""
    tasks = [part.strip() for part in re.split(r"(?:^|\n)\s*(?:\W*)Task \d+\s*:", completion.text)]
    cut = completion.finish_reason is FinishReason.LENGTH
    return (tasks[:-1], 1) if cut else (tasks, 0)


def _pool(config: InstructConfig, seeds: Artifact, earlier: list[Artifact], held_out: list[Artifact]) -> Pool:
    demonstrations = (
        read_records(seeds.path / "demonstrations.jsonl", Demonstration) if seeds.counts.get("ift", 1) else []
    )
    conversations = {one.question or one.id: one.prompt for one in demonstrations if one.source == "ift"}
    instructions = [instruction_of(prompt) for prompt in conversations.values()]
    before, measured = (
        [record for artifact in artifacts for record in _instructions(artifact)] for artifacts in (earlier, held_out)
    )
    return Pool(
        config,
        instructions,
        earlier=[text for record in before for text in _asked(record)],
        held_out=[text for record in measured for text in _asked(record)],
        held_out_whole=[compared_prompt(record.prompt) for record in measured],
    )


def _asked(record: Instruction) -> list[str]:
    """Return what an instruction asks: its text without a system turn, and the user's turns of a conversation."""
    return [compared_prompt(record.prompt), *_user_turns(record)]


def _user_turns(record: Instruction) -> list[str]:
    return [turn["content"] for turn in record.turns if turn["role"] == "user"]


def _draw(pool: Pool, seed: int) -> list[str]:
    """Draw the few-shot examples of one prompt, in shuffled order."""
    rng, config, generated = random.Random(seed), pool.config, [*pool.earlier, *pool.kept]
    examples = rng.sample(generated, min(config.generated_examples, len(generated)))
    missing = config.seed_examples + config.generated_examples - len(examples)
    examples += rng.sample(pool.seeds, min(missing, len(pool.seeds)))
    rng.shuffle(examples)
    return examples


def _requests(
    generator: Generator, config: InstructConfig, shown: Sequence[list[str]], seed: int, batch: int
) -> list[Request]:
    """Make the requests: each asks for one more task after its few-shot examples."""
    requests = [
        Request(
            prompt=_encode(generator, config.prompt, examples),
            seeds=[derive_seed(seed, "write", batch, index)],
        )
        for index, examples in enumerate(shown)
    ]
    longest = max(len(request.prompt) for request in requests)
    if longest + config.sampling.max_new_tokens > generator.context:
        raise SelfalignError(
            f"data.instruct: a few-shot prompt of {longest} tokens and "
            f"data.instruct.sampling.max_new_tokens={config.sampling.max_new_tokens} exceed the model's context of "
            f"{generator.context} tokens; lower data.instruct.seed_examples"
        )
    return requests


def _encode(generator: Generator, prompt: str, examples: list[str]) -> list[int]:
    """Tokenise the user turn with the few-shot examples, and the beginning of the response."""
    listed = "\n\n".join(f"Task {number}: {text}" for number, text in enumerate(examples, start=1))
    user = {"role": "user", "content": f"{prompt}\n\n{listed}"}
    return encode_prompt(generator.tokenizer, [user], f"Task {len(examples) + 1}:")


def _instructions(artifact: Artifact) -> list[Instruction]:
    return read_records(artifact.path / "instructions.jsonl", Instruction)
