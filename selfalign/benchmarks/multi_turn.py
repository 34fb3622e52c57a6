"""Multi-turn answering: a policy answers each turn of a question after its own answers to the turns before."""

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
    """A question and the answers so far.

    Attributes:
        question: the question with all its turns.
        answers: one for each turn; fewer than the question's turns if one did not fit into the policy's context.
        finished: whether each answer ended by itself.
    """

    question: Question
    answers: list[str] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """Return all turns so far and the user's next turn."""
        messages: list[Message] = []
        for turn, answer in zip(self.question.turns, self.answers, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": self.question.turns[len(self.answers)]}]


def as_records(talks: Sequence[Conversation], writer: str) -> tuple[list[Instruction], list[Response]]:
    """Return every answer with the user's turns before it, as records for comparisons between models.

    From the second turn on, both texts hold all turns so far, the model's own earlier answers among them.
    """
    instructions: list[Instruction] = []
    responses: list[Response] = []
    for talk in talks:
        for turn in range(1, len(talk.answers) + 1):
            name = f"{talk.question.question_id}-{turn}"
            text = numbered(talk.question.turns[:turn])
            instructions.append(Instruction(id=name, text=text, source="evaluation", category=talk.question.category))
            responses.append(given_response(f"{name}-{writer}", name, numbered(talk.answers[:turn]), writer))
    return instructions, responses


def numbered(turns: Sequence[str]) -> str:
    """Return a single turn as it is, and several turns each under its number."""
    return turns[0] if len(turns) == 1 else "\n\n".join(f"[Turn {n}]\n{text}" for n, text in enumerate(turns, start=1))


def converse(
    context: BenchmarkContext, out: StageOutput, questions: Sequence[Question], sampling: Callable[[Question], Sampling]
) -> list[Conversation]:
    """Answer every turn of every question. A conversation ends before a turn that does not fit into the context.

    Args:
        context: of the benchmark; its seed draws the tokens, with the question's id and the index of the turn.
        out: keeps finished batches.
        questions: the questions.
        sampling: returns the sampling of a question; turns of equal temperature are generated together.

    Raises:
        SelfalignError: no question fits into the context.
    """
    conversations = [Conversation(question) for question in questions]
    with context.engine.load(context.policy) as generator:
        with out.journal(sum(len(question.turns) for question in questions), "answers") as journal:
            _answer_turns(generator, conversations, sampling, journal, context.seed)
        if not any(talk.answers for talk in conversations):
            raise SelfalignError(
                f"{out.label}: no question and its answer fit into the context of {generator.context} tokens"
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
                settings, messages = sampling(talk.question), answer_prompt(generator.tokenizer, talk.messages())
                prompt = encode_prompt(generator.tokenizer, messages)
                seeds = [derive_seed(seed, talk.question.question_id, turn)]
                if len(prompt) + settings.longest <= generator.context:
                    request = Request(prompt=prompt, seeds=seeds)
                    waiting.setdefault(settings.temperature, []).append((talk, settings, request))
        for temperature, members in sorted(waiting.items()):
            requests, settings = [request for *_, request in members], members[0][1]
            written = generate_batched(generator, requests, settings, journal, f"turn-{turn + 1}-{temperature}")
            for (talk, *_), [made] in zip(members, written, strict=True):
                talk.answers.append(made.text)
                talk.finished.append(made.finish_reason == FinishReason.EOS)
