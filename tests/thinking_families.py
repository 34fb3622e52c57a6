"""Chat templates that know thoughts, one a family of models, reduced to what matters of them: our own wording."""

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from selfalign.core.records import FinishReason
from selfalign.engines.protocol import Completion
from selfalign.models.checkpoint import PolicyCheckpoint
from selfalign.models.tokenizer import decode_response


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A template, the tokens that it needs, and what its models write.

    Attributes:
        template: in Jinja.
        words: tokens marked as special.
        marks: tokens not marked as special.
        thought: "Let me see." as these models write it, white space before the answer included.
        prompt: the end of the prompt.
        nothing: what stands between prompt and answer where nothing was thought.
        own: how a turn of the assistant's is given to the template with its thought, where it writes one.
        end: the token that ends a turn.
        arguments: of the template, for models that think.
    """

    template: str
    words: tuple[str, ...]
    marks: tuple[str, ...] = ()
    thought: str
    prompt: str
    nothing: str = ""
    own: dict[str, str] | None = None
    end: str = "<|im_end|>"
    arguments: dict[str, Any] = field(default_factory=dict)


CHATML = ("<|im_start|>", "<|im_end|>")

QWEN3 = """{%- for m in messages %}{%- if m.role == 'assistant' %}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- set mind = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else '' %}
{{- '<|im_start|>assistant\\n' }}{%- if loop.last %}{{- '<think>\\n' + mind + '\\n</think>\\n\\n' }}{%- endif %}
{{- said + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if not (enable_thinking | default(true)) %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""

SMOLLM3 = """{%- set thinks = enable_thinking | default(true) %}
{{- '<|im_start|>system\\nReasoning Mode: ' + ('/think' if thinks else '/no_think') + '<|im_end|>\\n' }}
{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}
{%- if not thinks %}{{- '<think>\\n\\n</think>\\n' }}{%- endif %}{{- m.content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if not thinks %}{{- '<think>\\n\\n</think>\\n' }}{%- endif %}{%- endif %}"""

DEEPSEEK_R1 = """{%- for m in messages %}{%- if m.role == 'assistant' %}
{{- '<|assistant|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}
{%- else %}{{- '<|user|>' + m.content }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>\\n' }}{%- endif %}"""

GPT_OSS = """{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort | default('medium')) + '<|end|>' }}
{%- for m in messages %}{%- if m.role == 'assistant' %}{%- if loop.last and not add_generation_prompt %}
{%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

GRANITE = """{%- if thinking %}{{- '<|role|>system<|/role|>Write thoughts after Here is my thought process: and the ' }}
{{- 'response after Here is my response:<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}{{- '<|role|>' + m.role + '<|/role|>' + m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|role|>assistant<|/role|>' }}{%- endif %}"""

GEMMA4 = """{%- if enable_thinking %}{{- '<|turn>system\\n<|think|><turn|>\\n' }}{%- endif %}
{%- for m in messages %}{{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{%- if m.role == 'assistant' %}{{- m.content.split('<channel|>')[-1] | trim }}
{%- else %}{{- m.content | trim }}{%- endif %}{{- '<turn|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn>model\\n' }}
{%- if not enable_thinking %}{{- '<|channel>thought\\n<channel|>' }}{%- endif %}{%- endif %}"""

TAGS = ("<think>", "</think>")
SAID = {"content": "<think>\nLet me see.\n</think>\n\nA wren."}

FAMILIES = {
    "qwen3": Family(
        template=QWEN3,
        words=CHATML,
        marks=TAGS,
        thought="<think>\nLet me see.\n</think>\n\n",
        prompt="<|im_start|>assistant\n",
        nothing="<think>\n\n</think>\n\n",
        own=SAID,
    ),
    "smollm3": Family(
        template=SMOLLM3,
        words=CHATML,
        marks=TAGS,
        thought="<think>\nLet me see.\n</think>\n\n",
        prompt="<|im_start|>assistant\n",
        own=SAID,
    ),
    "deepseek_r1": Family(
        template=DEEPSEEK_R1,
        words=("<|user|>", "<|assistant|>"),
        marks=TAGS,
        thought="Let me see.\n</think>\n\n",
        prompt="<|assistant|><think>\n",
        nothing="\n</think>\n\n",
    ),
    "gpt_oss": Family(
        template=GPT_OSS,
        words=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
        thought="<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>final<|message|>",
        prompt="<|start|>assistant",
        nothing="<|channel|>final<|message|>",
        own={"content": "A wren.", "thinking": "Let me see."},
        end="<|return|>",
        arguments={"reasoning_effort": "low"},
    ),
    "granite": Family(
        template=GRANITE,
        words=("<|role|>", "<|/role|>"),
        thought="Here is my thought process: Let me see.\n\nHere is my response: ",
        prompt="assistant<|/role|>",
        own={"content": "Here is my thought process: Let me see.\n\nHere is my response: A wren."},
        arguments={"thinking": True},
    ),
    "gemma4": Family(
        template=GEMMA4,
        words=("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"),
        thought="<|channel>thought\nLet me see.<channel|>",
        prompt="<|turn>model\n",
        end="<turn|>",
        arguments={"enable_thinking": True},
    ),
}


def family(name: str) -> Family:
    return FAMILIES[name]


def thinking_tokenizer(plain: Any, name: str, **arguments: Any) -> Any:
    """A plain tokenizer with a family's tokens and template."""
    one, tokenizer = FAMILIES[name], deepcopy(plain)
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in one.words], special_tokens=True)
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in one.marks])
    tokenizer.eos_token = one.end
    tokenizer.chat_template = one.template
    if arguments := {**one.arguments, **arguments}:
        tokenizer.init_kwargs["chat_template_arguments"] = arguments
    return tokenizer


def thinking_model(files: PolicyCheckpoint, name: str, folder: Path) -> Path:
    """A folder with a tiny model of a family, as one comes from outside."""
    tokenizer = thinking_tokenizer(files.load_tokenizer(), name)
    tokenizer.init_kwargs.pop("chat_template_arguments", None)
    model: Any = AutoModelForCausalLM.from_pretrained(files.path / "weights", dtype=torch.float32)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def completion_of(tokenizer: Any, text: str) -> Completion:
    """A text as a model of a family would have written it, its end included."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    written = decode_response(tokenizer, ids)
    return Completion(text=written, finish_reason=FinishReason.EOS, tokens=len(ids), ids=ids)
