"""instruct: seed instructions + a policy, or given instructions → new instructions."""

import math
import random
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed, digest_text
from selfalign.core.jsonl import read_records, write_records
from selfalign.core.placeholders import check_template
from selfalign.core.records import Demonstration, FinishReason, Instruction
from selfalign.data.rouge import RougeIndex
from selfalign.data.text_filters import Language, is_fragment, words_of
from selfalign.data.turns import instruction_of
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
OWN_WRITERS = ("self", "sft", "base")

PROMPTS_EACH = 4
"""Prompts that may be asked for each instruction that is wanted. A prompt asks for one task; in the demo 28 were kept
of 48 prompts and of 32, .58 and .88 a prompt, so a writer that needs four hardly writes any."""

LEAST_BATCHES = 10
"""Batches that are allowed however few instructions are wanted: of a handful of prompts chance can spoil most."""


@dataclass(kw_only=True, slots=True)
class InstructConfig:
    """Self-instruction creation, arXiv 2401.10020, section 2.2, after Self-Instruct (arXiv 2212.10560).

    Attributes:
        count: new instructions to keep in each iteration.
        model: "self" (M_t), "sft" (M1), "base" (M0), or a fixed model as in the paper's main run: a folder, hub id
            or packaged model as `model.path` takes.
        source: a data source to take instructions from, in its order, instead of having them written; empty for none.
        seed_examples: examples in the prompt from the seeds.
        generated_examples: examples in the prompt that were written before; seeds take their place until there are any.
        prompts_per_batch: how many prompts are answered side by side; within a batch none sees another's result. What
            many processes share out among them, so worth raising where there are many.
        max_rouge_l: an instruction whose ROUGE-L F1 to any seed, kept or held-out one reaches this is dropped.
        min_words: shorter ones are dropped.
        max_words: longer ones are dropped.
        keywords: instructions with one of these words, or its plural, ask for what a language model cannot see or make.
        max_batches: stops with an error when so many batches did not give enough; 0 allows as many as ask
            `PROMPTS_EACH` prompts for each instruction of `count`, and `LEAST_BATCHES` at least.
        prompt: how the model is asked; our own wording.
        sampling: how it writes.
    """

    count: int = 64
    model: str = "self"
    source: str = ""
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
        self.sampling.check("data.instruct.sampling")
        if self.sampling.thought_tokens:
            raise SelfalignError(
                "data.instruct.sampling.thought_tokens has no effect: a task is continued where it begins, so nothing "
                "is thought before it; set it to 0"
            )
        check_template(self.prompt, "data.instruct.prompt", ())
        if self.fixed_writer and "/" not in self.model and self.model not in BUILDERS:
            raise SelfalignError(
                f"data.instruct.model must be {', '.join(OWN_WRITERS)}, a model's folder (./NAME), a hub id "
                f"(owner/name) or one of {', '.join(BUILDERS)}; got {self.model!r}"
            )
        if self.source and self.model != "self":
            raise SelfalignError(
                f"data.instruct.model={self.model} and data.instruct.source exclude each other; set one of the two"
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
            asked, least = self.max_batches * self.prompts_per_batch, math.ceil(self.count / self.prompts_per_batch)
            raise SelfalignError(
                f"data.instruct.count={self.count}, but data.instruct.max_batches={self.max_batches} of "
                f"data.instruct.prompts_per_batch={self.prompts_per_batch} ask for {asked} tasks at most: set "
                f"max_batches to 0, which allows enough, or above {least}, since not every task is kept"
            )

    @property
    def most_batches(self) -> int:
        """After how many batches the writer is given up."""
        return self.max_batches or max(LEAST_BATCHES, math.ceil(PROMPTS_EACH * self.count / self.prompts_per_batch))

    @property
    def fixed_writer(self) -> bool:
        """Whether the writer is a model from outside the run."""
        return self.model not in OWN_WRITERS


@dataclass(slots=True)
class Pool:
    """The instructions there are; takes what adds to them, and counts by reason what does not.

    Attributes:
        config: the limits.
        seeds: instructions that M1 learnt from.
        earlier: those of earlier iterations.
        held_out: those no training may see.
        kept: those taken.
        dropped: how many were not taken, by reason.
        highest: the highest ROUGE-L F1 of each kept one to anything in the pool before it.
    """

    config: InstructConfig
    seeds: list[str]
    earlier: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    highest: list[float] = field(default_factory=list)
    _language: Language = field(init=False)
    _known: RougeIndex = field(init=False)
    _known_seeds: RougeIndex = field(init=False)
    _known_held_out: RougeIndex = field(init=False)

    def __post_init__(self) -> None:
        self._language = Language.of(self.seeds)
        self._known = RougeIndex.of(self.seeds + self.earlier)
        self._known_seeds = RougeIndex.of(self.seeds)
        self._known_held_out = RougeIndex.of(self.held_out)

    @property
    def full(self) -> bool:
        """Whether there are `count` new ones."""
        return len(self.kept) == self.config.count

    def offer(self, text: str, shown: Collection[str] = ()) -> bool:
        """Takes a text, or counts why not.

        Args:
            text: the instruction.
            shown: the demonstrations in the prompt it was written from.
        """
        words = words_of(text)
        reason = "surplus" if self.full else self._flaw(text, words) or self._copied(words, shown)
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
        """The ledger, and what the kept ones are like."""
        return {
            catalog.KEPT.name: len(self.kept),
            "dropped": dict(sorted((+self.dropped).items())),
            **instruction_statistics([words_of(text) for text in self.kept], self.highest),
        }

    def _flaw(self, text: str, words: list[str]) -> str | None:
        """Return what is wrong with a text itself, or None."""
        if not words:
            return "empty"
        if is_fragment(text):
            return "fragment"
        if len(words) < self.config.min_words:
            return "too_short"
        if len(words) > self.config.max_words:
            return "too_long"
        if any({word, word.removesuffix("s")} & set(self.config.keywords) for word in words):
            return "keyword"
        return "language" if self._language.differs(text) else None

    def _copied(self, words: list[str], shown: Collection[str]) -> str | None:
        """Return what a text copies, or "held_out" where it comes near to a held-out instruction, or None."""
        if self._known_held_out.highest(words) >= self.config.max_rouge_l:
            return "held_out"
        if words in map(words_of, shown):
            return "copy_of_demonstration"
        if words in self._known_seeds:
            return "copy_of_seed"
        return "copy_of_kept" if words in self._known else None


def size(*, config: InstructConfig, policy: Artifact, **others: object) -> Size:
    """As many as are asked for."""
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
    """Lets a policy write instructions until `count` have passed the filters.

    Args:
        out: gets instructions.jsonl.
        config: sizes and filters.
        policy: the writer.
        seeds: demonstrations.jsonl, whose instructions are the examples.
        earlier: instructions of earlier iterations, which new ones must differ from.
        held_out: instructions that are measured on, which new ones must differ from.
        engine: the engine.
        seed: draws the examples and the tokens.

    Raises:
        SelfalignError: `max_batches` did not give enough.
    """
    pool = _pool(config, seeds, earlier, held_out)
    if len(pool.seeds) < config.seed_examples:
        raise SelfalignError(
            f"data.instruct.seed_examples={config.seed_examples}, but there are {len(pool.seeds)} IFT seeds"
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
            f"(dropped: {dict(+pool.dropped)}); raise data.instruct.max_batches above {config.most_batches} or loosen "
            "the filters"
        )
    # By the text alone: what is drawn for a record must not depend on how the writer's weights were rounded.
    records = [Instruction(id=digest_text(text)[:16], text=text, source="self") for text in pool.kept]
    write_records(out.path / "instructions.jsonl", records)
    return {catalog.WRITTEN.name: written, catalog.BATCHES.name: batch, **pool.counts(), **generator.counts}


def size_of_given(*, config: InstructConfig, **others: object) -> Size:
    """As many as are asked for."""
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
    """Takes the next given instructions until `count` have passed the filters.

    Args:
        out: gets instructions.jsonl.
        config: sizes and filters.
        given: instructions.jsonl, all there are; it is read on behind the last one an earlier iteration took.
        seeds: demonstrations.jsonl, which new ones must differ from.
        earlier: instructions of earlier iterations, which new ones must differ from.
        held_out: instructions that are measured on, which new ones must differ from.

    Raises:
        SelfalignError: what is left of them does not give enough.
    """
    pool = _pool(config, seeds, earlier, held_out)
    records = _instructions(given)
    taken = {record.id for artifact in earlier for record in _instructions(artifact)}
    start = max((place for place, record in enumerate(records, start=1) if record.id in taken), default=0)
    kept: list[Instruction] = []
    written = 0
    for record in records[start:]:
        if pool.full:
            break
        written += 1
        if pool.offer(record.text):
            kept.append(replace(record, source="given"))
    if not pool.full:
        raise SelfalignError(
            f"{out.label}: {len(kept)} of {config.count} instructions in what is left of data.instruct.source="
            f"{config.source}, {written} of {len(records)} (dropped: {dict(pool.dropped)}); give more, lower "
            "data.instruct.count or loosen the filters"
        )
    write_records(out.path / "instructions.jsonl", kept)
    return {catalog.WRITTEN.name: written, **pool.counts()}


def split_tasks(completion: Completion) -> tuple[list[str], int]:
    """The tasks in a completion of "Task 9:", and how many were cut by the token limit (0 or 1)."""
    tasks = [part.strip() for part in re.split(r"(?:^|\n)\s*(?:\W*)Task \d+\s*:", completion.text)]
    cut = completion.finish_reason is FinishReason.LENGTH
    return (tasks[:-1], 1) if cut else (tasks, 0)


def _pool(config: InstructConfig, seeds: Artifact, earlier: list[Artifact], held_out: list[Artifact]) -> Pool:
    demonstrations = (
        read_records(seeds.path / "demonstrations.jsonl", Demonstration) if seeds.counts.get("ift", 1) else []
    )
    given = [instruction_of(record.prompt) for record in demonstrations if record.source == "ift"]
    before, apart = (
        [record.text for artifact in artifacts for record in _instructions(artifact)]
        for artifacts in (earlier, held_out)
    )
    return Pool(config, given, before, apart)


def _draw(pool: Pool, seed: int) -> list[str]:
    """The demonstrations of one prompt, in shuffled order."""
    draw, config, own = random.Random(seed), pool.config, [*pool.earlier, *pool.kept]
    mine = draw.sample(own, min(config.generated_examples, len(own)))
    total = config.seed_examples + config.generated_examples
    examples = mine + draw.sample(pool.seeds, min(total - len(mine), len(pool.seeds)))
    draw.shuffle(examples)
    return examples


def _requests(
    generator: Generator, config: InstructConfig, shown: Sequence[list[str]], seed: int, batch: int
) -> list[Request]:
    """Asks for one more task behind each prompt's demonstrations."""
    requests = [
        Request(
            prompt=_ask(generator, config.prompt, examples),
            seeds=[derive_seed(seed, "write", batch, index)],
        )
        for index, examples in enumerate(shown)
    ]
    longest = max(len(request.prompt) for request in requests)
    if longest + config.sampling.max_new_tokens > generator.context:
        raise SelfalignError(
            f"the few-shot prompt of {longest} tokens leaves no room for {config.sampling.max_new_tokens} more in the "
            f"context of {generator.context}; lower data.instruct.seed_examples"
        )
    return requests


def _ask(generator: Generator, prompt: str, examples: list[str]) -> list[int]:
    """The user's turn with the demonstrations, and how the answer begins."""
    listed = "\n\n".join(f"Task {number}: {text}" for number, text in enumerate(examples, start=1))
    user = {"role": "user", "content": f"{prompt}\n\n{listed}"}
    return encode_prompt(generator.tokenizer, [user], f"Task {len(examples) + 1}:")


def _instructions(artifact: Artifact) -> list[Instruction]:
    return read_records(artifact.path / "instructions.jsonl", Instruction)
