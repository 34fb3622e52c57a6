"""Chat templates that write tools, one a kind, reduced to what matters of them: our own wording."""

from copy import deepcopy
from typing import Any

from tokenizers import AddedToken

QWEN3 = """{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}{{- 'Tools:' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=messages | length - 1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set said = (m.content or '').split('</think>')[-1].lstrip('\\n') %}
{%- set mind = (m.content or '').rpartition('</think>')[0].split('<think>')[-1].strip('\\n') %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or mind) %}{{- '<think>\\n' + mind + '\\n</think>\\n\\n' }}{%- endif %}
{{- said }}
{%- for c in m.tool_calls or [] %}{%- if (loop.first and said) or not loop.first %}{{- '\\n' }}{%- endif %}
{%- set f = c.function %}{{- '<tool_call>\\n{"name": "' + f.name + '", "arguments": ' }}
{{- f.arguments if f.arguments is string else f.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

HERMES = """{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{%- if m.name is not defined %}{{- raise_exception('a tool turn needs a name') }}{%- endif %}
{{- '<|im_start|>tool\\n{"name": "' + m.name + '", "content": ' + (m.content | tojson) + '}<|im_end|>\\n' }}
{%- elif m.tool_calls is defined %}{{- '<|im_start|>assistant' }}
{%- for c in m.tool_calls %}{{- '\\n<tool_call>\\n{"arguments": ' + (c.function.arguments | tojson) }}
{{- ', "name": "' + c.function.name + '"}\\n</tool_call> ' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA3 = """{{- '<|begin|>' }}{%- set ns = namespace(told=false) %}{%- for m in messages %}
{%- if m.role == 'tool' %}{{- '<|head|>ipython<|/head|>\\n\\n' + ({'output': m.content} | tojson) + '<|eot|>' }}
{%- elif 'tool_calls' in m %}
{%- if m.tool_calls | length > 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
{%- set f = m.tool_calls[0].function %}
{{- '<|head|>assistant<|/head|>\\n\\n{"name": "' + f.name + '", "parameters": ' + (f.arguments | tojson) + '}' }}
{{- '<|eom|>' if f.name == 'python' else '<|eot|>' }}
{%- else %}{{- '<|head|>' + m.role + '<|/head|>\\n\\n' }}
{%- if tools and m.role == 'user' and not ns.told %}{%- set ns.told = true %}
{%- for t in tools %}{{- (t | tojson(indent=4)) + '\\n\\n' }}{%- endfor %}{%- endif %}
{{- (m.content | trim) + '<|eot|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\\n\\n' }}{%- endif %}"""

MISTRAL = """{{- '<|begin|>' }}{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}
{%- if m.role == 'user' %}{%- if tools and m == users[-1] %}{{- '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{%- endif %}
{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}
{{- raise_exception('ids of calls have 9 characters') }}{%- endif %}
{{- '[RESULT]' + ({'content': m.content, 'call_id': m.tool_call_id} | tojson) + '[/RESULT]' }}
{%- elif m.tool_calls %}{{- '[CALLS][' }}
{%- for c in m.tool_calls %}{%- if c.id is not defined or c.id | length != 9 %}
{{- raise_exception('ids of calls have 9 characters') }}{%- endif %}
{{- (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' }}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}
{{- ']<|eot|>' }}
{%- else %}{{- ' ' + m.content + '<|eot|>' }}{%- endif %}{%- endfor %}"""

DEEPSEEK = """{{- '<|begin|>' }}{%- if tools %}{{- tools | tojson }}{%- endif %}{%- set ns = namespace(tool=false) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{%- set ns.tool = false %}{{- '<|user|>' + m.content + '<|assistant|>' }}
{%- elif m.role == 'assistant' and m.content is not string %}{{- '<|results|>' if ns.tool else '' }}
{%- for c in m.tool_calls %}{%- set f = c.function %}
{{- '<|call|>' + f.name + '\\n```json\\n' + f.arguments + '\\n```' }}{%- endfor %}
{{- '<|eot|>' }}
{%- elif m.role == 'assistant' %}{{- ('<|results|>' if ns.tool else '') + m.content + '<|eot|>' }}
{%- else %}{%- set ns.tool = true %}{{- '<|result|>' + m.content }}{%- endif %}{%- endfor %}"""

PLAIN = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

WORDS = [
    "<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>", "<|eom|>", "[TOOLS]", "[/TOOLS]",
    "[INST]", "[/INST]", "[RESULT]", "[/RESULT]", "[CALLS]", "<|user|>", "<|assistant|>", "<|call|>", "<|result|>",
    "<|results|>",
]  # fmt: skip
TEMPLATES = {"qwen3": QWEN3, "hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL, "deepseek": DEEPSEEK}
ENDS = {"qwen3": "<|im_end|>", "hermes": "<|im_end|>", "llama3": "<|eot|>", "mistral": "<|eot|>", "deepseek": "<|eot|>"}


def tokenizer_of(plain: Any, template: str) -> Any:
    """A plain tokenizer with the tokens of all kinds, and a kind's template or another one."""
    tokenizer = deepcopy(plain)
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in WORDS], special_tokens=True)
    tokenizer.add_tokens([AddedToken(w, special=False, normalized=False) for w in ("<tool_call>", "</tool_call>")])
    tokenizer.eos_token = ENDS.get(template, "<|im_end|>")
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer
