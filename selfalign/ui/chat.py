"""A conversation with one or two models, as their run would have them answer."""

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from threading import Lock

from selfalign.core.errors import SelfalignError
from selfalign.core.records import FinishReason, Message
from selfalign.engines.protocol import Request, Sampling, part_completion
from selfalign.engines.transformers import Transformers, TransformersGenerator
from selfalign.models.chat_template import markers_of
from selfalign.models.checkpoint import PolicyCheckpoint, release_memory
from selfalign.models.config import DTYPES
from selfalign.models.tokenizer import answer_prompt, encode_prompt, under_system
from selfalign.runs.labels import Label
from selfalign.ui.run_records import RunRecords

LOADED = 2
"""Models that are kept in memory."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's answer.

    Attributes:
        model: its name.
        text: the answer.
        thought: what was written before it, with the model's markers; empty if it did not think.
        finish_reason: why it ended.
        system: the model's system turn before the conversation; empty if it has none.
    """

    model: str
    text: str
    thought: str
    finish_reason: FinishReason
    system: str = ""

    @property
    def whole(self) -> str:
        """The thought and the answer, as training data hold them."""
        return self.thought + self.text


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question, its replies, and the number of the reply that the conversation goes on from."""

    question: str
    replies: list[Reply] = field(default_factory=list)
    kept: int = 0


@dataclass(frozen=True, slots=True)
class Conversation:
    """All exchanges so far."""

    exchanges: list[Exchange] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """Return the turns up to the last question, with the replies that were kept before it."""
        turns: list[Message] = []
        for exchange in self.exchanges[:-1]:
            turns.append({"role": "user", "content": exchange.question})
            turns.append({"role": "assistant", "content": exchange.replies[exchange.kept].text})
        return [*turns, {"role": "user", "content": self.exchanges[-1].question}]

    def asked(self, question: str) -> "Conversation":
        """Return the conversation with another question."""
        return Conversation([*self.exchanges, Exchange(question)])

    def answered(self, replies: list[Reply]) -> "Conversation":
        """Return the conversation with the replies to the last question."""
        return Conversation([*self.exchanges[:-1], replace(self.exchanges[-1], replies=replies)])

    def keeping(self, kept: int) -> "Conversation":
        """Return the conversation that goes on from another reply to the last question."""
        return Conversation([*self.exchanges[:-1], replace(self.exchanges[-1], kept=kept)])


@dataclass(slots=True)
class ChatModels:
    """The models of several runs, loaded when they are first asked, the last used ones kept.

    Attributes:
        runs: the runs.
    """

    runs: list[RunRecords]
    _loaded: OrderedDict[str, TransformersGenerator] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def places(self) -> dict[str, tuple[RunRecords, Label]]:
        """Return {name of a model: (run, model)}, the last model of the first run first."""
        alone = len(self.runs) == 1
        return {
            str(label) if alone else f"{run.name}: {label}": (run, label)
            for run in self.runs
            for label in reversed(run.models())
        }

    def sampling(self, name: str) -> Sampling:
        """Return how the run of a model samples its evaluation answers; the default where it evaluates nothing."""
        run, _ = self._place(name)
        settings = (run.config.get("evaluate") or {}).get("sampling") or {}
        return Sampling(**settings)

    def reply(self, name: str, messages: list[Message], sampling: Sampling, seed: int) -> Reply:
        """Return a model's reply to a conversation, through its chat template and with its system prompt.

        Args:
            name: one of `places`.
            messages: the conversation, the user's turn last.
            sampling: how tokens are sampled.
            seed: of the sampling.

        Raises:
            SelfalignError: the conversation does not fit into the model's context, or its template refuses it.
        """
        sampling.check("sampling")
        with self._lock:  # One at a time: two would share the memory and the cores.
            generator = self._generator(name)
            tokenizer = generator.tokenizer
            prompt = encode_prompt(tokenizer, answer_prompt(tokenizer, messages))
            if len(prompt) + sampling.longest > generator.context:
                raise SelfalignError(
                    f"{name}: the conversation has {len(prompt)} tokens, which do not fit into the context of "
                    f"{generator.context} with {sampling.longest} to write. Lower the limits, or begin a new one"
                )
            whole = replace(sampling, max_new_tokens=sampling.longest, thought_tokens=0)
            [[written]] = generator.generate([Request(prompt=prompt, seeds=[seed])], whole)
            made = part_completion(tokenizer, prompt, written, sampling)
        markers, thought = markers_of(tokenizer), made.thought
        if thought and markers is not None and not thought.lstrip().startswith(markers.open):
            thought = markers.open + thought  # The prompt has opened it.
        first = under_system(tokenizer, messages)[0]
        system = first["content"] if isinstance(first, dict) and first["role"] == "system" else ""
        return Reply(name, made.text, thought, made.finish_reason, system)

    def _place(self, name: str) -> tuple[RunRecords, Label]:
        places = self.places()
        if name not in places:
            raise SelfalignError(f"there is no model {name!r}; there are {', '.join(places)}")
        return places[name]

    def _generator(self, name: str) -> TransformersGenerator:
        if name not in self._loaded:
            run, label = self._place(name)
            while len(self._loaded) >= LOADED:
                self._loaded.popitem(last=False)
                release_memory()
            dtype = (run.config.get("engine") or {}).get("dtype", "auto")
            engine = Transformers(dtype=dtype if dtype in DTYPES else "auto")
            self._loaded[name] = engine.load(PolicyCheckpoint(label.link_in(run.folder)))
        self._loaded.move_to_end(name)
        return self._loaded[name]
