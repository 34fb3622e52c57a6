"""A policy talks about questions, turn by turn: each turn is answered behind its own answers to those before."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from selfalign.benchmarks.fastchat import Question
from selfalign.benchmarks.protocol import BenchmarkContext
from selfalign.core.errors import SelfalignError
from selfalign.core.files import derive_seed
from selfalign.core.records import FinishReason, Instruction, Message, Response
from selfalign.data.thinking import given_response
from selfalign.engines.protocol import Generator, Request, Sampling, generate_batched
from selfalign.models.tokenizer import answer_prompt, encode_prompt
from selfalign.store.artifacts import StageOutput
from selfalign.store.journal import Journal


@dataclass(slots=True)
class Conversation:
    """What was asked and answered so far.

    Attributes:
        question: what it is about.
        answers: one a turn; fewer than the question's turns where one did not fit into the policy's context.
        finished: of each answer, whether it ended by itself.
    """

    question: Question
    answers: list[str] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """All turns so far and the one that is to be answered."""
        said: list[Message] = []
        for asked, answer in zip(self.question.turns, self.answers, strict=False):
            said += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return [*said, {"role": "user", "content": self.question.turns[len(self.answers)]}]


def as_records(talks: Sequence[Conversation], writer: str) -> tuple[list[Instruction], list[Response]]:
    """Every answer with what the user had said by then, as two models' answers are compared.

    Behind a first turn both texts hold all turns so far, the model's own earlier answers among them.
    """
    asked: list[Instruction] = []
    answers: list[Response] = []
    for talk in talks:
        for turn in range(1, len(talk.answers) + 1):
            name = f"{talk.question.question_id}-{turn}"
            said = numbered(talk.question.turns[:turn])
            asked.append(Instruction(id=name, text=said, source="evaluation", category=talk.question.category))
            answers.append(given_response(f"{name}-{writer}", name, numbered(talk.answers[:turn]), writer))
    return asked, answers


def numbered(turns: Sequence[str]) -> str:
    """Returns one turn as it is, several each under its number."""
    return turns[0] if len(turns) == 1 else "\n\n".join(f"[Turn {n}]\n{text}" for n, text in enumerate(turns, start=1))


def converse(
    context: BenchmarkContext, out: StageOutput, questions: Sequence[Question], sampling: Callable[[Question], Sampling]
) -> list[Conversation]:
    """Answers every turn of every question; where a turn does not fit, the conversation ends before it.

    Args:
        context: who is asked; its seed draws the tokens, together with the question's id and the number of the turn.
        out: keeps finished batches.
        questions: what is asked.
        sampling: how a question is answered; turns that are drawn alike are written together.

    Raises:
        SelfalignError: no question fits into the context.
    """
    conversations = [Conversation(question) for question in questions]
    with context.engine.load(context.policy) as generator:
        with out.journal(sum(len(question.turns) for question in questions), "answers") as journal:
            _answer_turns(generator, conversations, sampling, journal, context.seed)
        if not any(talk.answers for talk in conversations):
            raise SelfalignError(
                f"{out.label}: no question fits into the context of {generator.context} tokens together with its answer"
            )
    return conversations


def _answer_turns(
    generator: Generator,
    conversations: Sequence[Conversation],
    sampling: Callable[[Question], Sampling],
    journal: Journal,
    seed: int,
) -> None:
    for turn in range(max(len(talk.question.turns) for talk in conversations)):
        waiting: dict[float, list[tuple[Conversation, Sampling, Request]]] = {}
        for talk in conversations:
            if len(talk.answers) == turn < len(talk.question.turns):
                how, asked = sampling(talk.question), answer_prompt(generator.tokenizer, talk.messages())
                prompt = encode_prompt(generator.tokenizer, asked)
                seeds = [derive_seed(seed, talk.question.question_id, turn)]
                if len(prompt) + how.longest <= generator.context:
                    waiting.setdefault(how.temperature, []).append((talk, how, Request(prompt=prompt, seeds=seeds)))
        for temperature, members in sorted(waiting.items()):
            requests, how = [request for *_, request in members], members[0][1]
            written = generate_batched(generator, requests, how, journal, f"turn-{turn + 1}-{temperature}")
            for (talk, *_), [made] in zip(members, written, strict=True):
                talk.answers.append(made.text)
                talk.finished.append(made.finish_reason == FinishReason.EOS)
