"""instruct: seed instructions + a policy → new instructions."""

import random
import re
from collections import Counter
from dataclasses import dataclass, field

from rapidfuzz.distance import Indel

from selfalign.errors import SelfalignError
from selfalign.files import derive_seed, digest_text
from selfalign.generation import Completion, Generator, Request, Sampling, Transformers
from selfalign.models import PolicyFiles
from selfalign.records import Demonstration, FinishReason, Instruction, read_records, write_records
from selfalign.store import Artefact, Counts, Workspace
from selfalign.tokenization import encode_prompt

PROMPT = (
    "Here are tasks that people gave to an assistant. Add one new task on a subject that none of them has. "
    "It should be clear, complete in itself and answerable in a few sentences. Write the task only, not its answer."
)
KEYWORDS = ("image", "picture", "photo", "graph", "diagram", "video", "audio", "draw", "plot", "file", "map")


@dataclass(kw_only=True, slots=True)
class InstructConfig:
    """Self-instruction creation, arXiv 2401.10020, section 2.2, after Self-Instruct (arXiv 2212.10560).

    Attributes:
        count: new instructions to keep in each iteration.
        writer: "self" (M_t), "sft" (M1) or "base" (M0, a fixed model as in the paper's main run).
        seed_demonstrations: examples in the prompt from the seeds.
        own_demonstrations: examples in the prompt that the model wrote before.
        prompts_per_batch: how many prompts are answered side by side; within a batch none sees another's result.
        max_rouge: an instruction whose ROUGE-L F1 to any seed or kept one reaches this is dropped.
        min_words: shorter ones are dropped.
        max_words: longer ones are dropped.
        keywords: instructions with one of these words, or its plural, ask for what a language model cannot see or make.
        max_batches: stops with an error when so many batches did not give enough.
        prompt: how the model is asked; our own wording.
        sampling: how it writes.
    """

    count: int = 64
    writer: str = "self"
    seed_demonstrations: int = 6
    own_demonstrations: int = 2
    prompts_per_batch: int = 32
    max_rouge: float = 0.7
    min_words: int = 4
    max_words: int = 150
    keywords: list[str] = field(default_factory=lambda: list(KEYWORDS))
    max_batches: int = 100
    prompt: str = PROMPT
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.6, max_new_tokens=128))

    def __post_init__(self) -> None:
        self.sampling.check("data.instruct.sampling")
        if self.writer not in ("self", "sft", "base"):
            raise SelfalignError(f"data.instruct.writer must be self, sft or base; got {self.writer!r}")
        for name in ("count", "seed_demonstrations", "prompts_per_batch", "min_words", "max_batches"):
            if getattr(self, name) < 1:
                raise SelfalignError(f"data.instruct.{name} must be 1 or more, got {getattr(self, name)}")
        if self.own_demonstrations < 0:
            raise SelfalignError(f"data.instruct.own_demonstrations must be 0 or more, got {self.own_demonstrations}")
        if self.max_words < self.min_words:
            raise SelfalignError(f"data.instruct.max_words is {self.max_words}, below min_words={self.min_words}")
        if not 0 < self.max_rouge <= 1:
            raise SelfalignError(f"data.instruct.max_rouge must be above 0 and at most 1, got {self.max_rouge}")


@dataclass(slots=True)
class Pool:
    """The instructions there are: those given, and those written so far; tells whether a text adds to them."""

    config: InstructConfig
    seeds: list[str]
    kept: list[str]
    known: list[list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.known = [words_of(text) for text in [*self.seeds, *self.kept]]

    def reason_against(self, text: str) -> str | None:
        """Why a text is not taken: "empty", "too_short", "too_long", "keyword", "copy", "similar"; or None."""
        words = words_of(text)
        if not words:
            return "empty"
        if len(words) < self.config.min_words:
            return "too_short"
        if len(words) > self.config.max_words:
            return "too_long"
        if any({word, word.removesuffix("s")} & set(self.config.keywords) for word in words):
            return "keyword"
        if words in self.known:
            return "copy"
        if any(rouge_l(words, other, self.config.max_rouge) for other in self.known):
            return "similar"
        return None

    def add(self, text: str) -> None:
        """Takes a text in, as one that later ones must differ from."""
        self.kept.append(text)
        self.known.append(words_of(text))


def instruct(
    out: Workspace,
    *,
    config: InstructConfig,
    policy: Artefact,
    seeds: Artefact,
    earlier: list[Artefact],
    generate: Transformers,
    seed: int,
) -> Counts:
    """Lets a policy write instructions until `count` have passed the filters.

    Args:
        out: gets instructions.jsonl.
        config: sizes and filters.
        policy: the writer.
        seeds: demonstrations.jsonl, whose instructions are the examples.
        earlier: instructions of earlier iterations, which new ones must differ from.
        generate: the backend.
        seed: draws the examples and the tokens.

    Raises:
        SelfalignError: `max_batches` did not give enough.
    """
    demonstrations = read_records(seeds.path / "demonstrations.jsonl", Demonstration)
    given = [record.prompt[0]["content"] for record in demonstrations if record.source == "ift"]  # pyright: ignore[reportArgumentType]
    if len(given) < config.seed_demonstrations:
        raise SelfalignError(
            f"data.instruct.seed_demonstrations={config.seed_demonstrations}, but there are {len(given)} IFT seeds"
        )
    before = [record.text for artefact in earlier for record in _instructions(artefact)]
    pool = Pool(config, [*given, *before], [])
    generator = generate.load(PolicyFiles(policy.path))
    drops: Counter[str] = Counter()
    written = batch = 0
    with out.journal(config.count, "instructions") as journal:
        while len(pool.kept) < config.count and batch < config.max_batches:
            prompts = [
                _few_shot(config, given, [*before, *pool.kept], derive_seed(seed, batch, index))
                for index in range(config.prompts_per_batch)
            ]
            texts, cut = journal.batch(
                str(batch),
                0,
                lambda prompts=prompts, batch=batch: _write(generator, config, prompts, seed, batch),
            )
            drops["truncated"] += cut
            written += len(texts)
            for text in texts:
                reason = pool.reason_against(text) if len(pool.kept) < config.count else "surplus"
                if reason is None:
                    pool.add(text)
                    journal.advance(1)
                else:
                    drops[reason] += 1
            batch += 1
    if len(pool.kept) < config.count:
        raise SelfalignError(
            f"{out.label}: {len(pool.kept)} of {config.count} instructions after {batch} batches "
            f"(dropped: {dict(+drops)}); raise data.instruct.max_batches or loosen the filters"
        )
    model = PolicyFiles(policy.path).digest
    records = [Instruction(id=f"{digest_text(model + text)[:16]}", text=text, source="self") for text in pool.kept]
    write_records(out.path / "instructions.jsonl", records)
    return {
        "written": written,
        "kept": len(pool.kept),
        "dropped": dict(sorted((+drops).items())),
        "batches": batch,
    }


def rouge_l(words: list[str], other: list[str], threshold: float) -> bool:
    """Whether the ROUGE-L F1 (Lin 2004) of two texts, 2·LCS / (length + length) in words, reaches the threshold."""
    return Indel.normalized_similarity(words, other, score_cutoff=threshold) >= threshold


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def split_tasks(completion: Completion) -> tuple[list[str], int]:
    """The tasks in a completion of "Task 9:", and how many were cut by the token limit (0 or 1)."""
    tasks = [part.strip() for part in re.split(r"(?:^|\n)\s*(?:\W*)Task \d+\s*:", completion.text)]
    cut = completion.finish_reason is FinishReason.LENGTH
    return (tasks[:-1], 1) if cut else (tasks, 0)


def _few_shot(config: InstructConfig, given: list[str], own: list[str], seed: int) -> tuple[str, str]:
    """The user's turn with shuffled examples, and how the answer begins."""
    draw = random.Random(seed)
    mine = draw.sample(own, min(config.own_demonstrations, len(own)))
    total = config.seed_demonstrations + config.own_demonstrations
    examples = mine + draw.sample(given, min(total - len(mine), len(given)))
    draw.shuffle(examples)
    listed = "\n\n".join(f"Task {number}: {text}" for number, text in enumerate(examples, start=1))
    return f"{config.prompt}\n\n{listed}", f"Task {len(examples) + 1}:"


def _write(
    generator: Generator, config: InstructConfig, prompts: list[tuple[str, str]], seed: int, batch: int
) -> tuple[list[str], int]:
    requests = [
        Request(
            prompt=encode_prompt(generator.tokenizer, [{"role": "user", "content": user}], prefill),
            seeds=[derive_seed(seed, "write", batch, index)],
        )
        for index, (user, prefill) in enumerate(prompts)
    ]
    longest = max(len(request.prompt) for request in requests)
    if longest + config.sampling.max_new_tokens > generator.context:
        raise SelfalignError(
            f"the few-shot prompt of {longest} tokens leaves no room for {config.sampling.max_new_tokens} more in the "
            f"context of {generator.context}; lower data.instruct.seed_demonstrations"
        )
    completions = generator.write(requests, config.sampling)
    split = [split_tasks(completion) for (completion,) in completions]
    return [text for tasks, _ in split for text in tasks], sum(cut for _, cut in split)


def _instructions(artefact: Artefact) -> list[Instruction]:
    return read_records(artefact.path / "instructions.jsonl", Instruction)
