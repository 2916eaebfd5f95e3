"""Tiny tokenizers and models of real families, made in code: nothing is downloaded.

A tokenizer has one token a byte besides its family's special tokens, and the family's own chat template (TRL
ships those it knows); a model has random weights in the family's architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

if TYPE_CHECKING:
    from pathlib import Path

SMOLLM2 = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' \
}}{% endif %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' \
}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# ChatML whose author marked what the assistant writes; the newline after its end token is not part of it.
MARKED = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Of no known family, but every turn only adds to the text before it.
PLAIN = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '### ' + message.role + ': ' + message.content }}
    {%- if message.role == 'assistant' %}{{- eos_token }}{%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### assistant: ' }}{%- endif %}"""

# Of no known family, and a turn's reasoning is gone as soon as another turn follows.
FORGETFUL = """\
{%- for message in messages %}
    {%- set content = message.content if loop.last else message.content.split('</think>')[-1] %}
    {{- '<|' + message.role + '|>' + content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""


@dataclass(frozen=True, slots=True)
class Family:
    """What tells one family's tokenizer and model from another's."""

    architecture: str  # class names in transformers, without Config and ForCausalLM
    template: str | None  # a template's text, or the name of one that TRL ships
    eos: str
    bos: str | None = None  # put before every text by the tokenizer itself
    special: tuple[str, ...] = ()


_CHATML = ("<|im_start|>", "<|endoftext|>")
_QWEN3 = (*_CHATML, "<think>", "</think>", "<tool_call>", "</tool_call>")
_LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
_GEMMA = ("<start_of_turn>", "<end_of_turn>")
_PHI3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

FAMILIES = {
    "qwen3": Family("Qwen3", "qwen3.jinja", eos="<|im_end|>", special=_QWEN3),
    "qwen2_5": Family("Qwen2", "qwen2_5.jinja", eos="<|im_end|>", special=_QWEN3),
    "llama3": Family("Llama", "llama3.jinja", eos="<|eot_id|>", bos="<|begin_of_text|>", special=_LLAMA3),
    "llama3_2": Family("Llama", "llama3_2.jinja", eos="<|eot_id|>", bos="<|begin_of_text|>", special=_LLAMA3),
    "gemma": Family("Gemma2", "gemma.jinja", eos="<eos>", bos="<bos>", special=_GEMMA),
    "gemma3": Family("Gemma3", "gemma3.jinja", eos="<eos>", bos="<bos>", special=_GEMMA),
    "phi3": Family("Phi3", "phi3.jinja", eos="<|endoftext|>", special=_PHI3),
    "smollm2": Family("Llama", SMOLLM2, eos="<|im_end|>", special=_CHATML),
    "marked": Family("Llama", MARKED, eos="<|im_end|>", special=_CHATML),
    "plain": Family("Llama", PLAIN, eos="</s>", bos="<s>"),
    "forgetful": Family("Llama", FORGETFUL, eos="</s>", special=("<|user|>", "<|assistant|>")),
    "base": Family("Llama", None, eos="</s>", bos="<s>"),
}


def tiny_tokenizer(
    family: str, *, template: str | None = None, merges: tuple[tuple[str, str], ...] = ()
) -> transformers.PreTrainedTokenizerFast:
    """The family's tokenizer with one token a byte, and what `merges` joins (in the byte alphabet)."""
    chosen = FAMILIES[family]
    if template:
        chosen = replace(chosen, template=template)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_bytes_tokenizer(chosen, merges),
        bos_token=chosen.bos,
        eos_token=chosen.eos,
        pad_token="<pad>",
    )
    tokenizer.chat_template = _template_text(chosen.template)
    return tokenizer


def random_weights_folder(path: Path, family: str, *, seed: int = 0) -> Path:
    """A very small model of the family with its tokenizer, as `--base-model` takes it."""
    tokenizer = tiny_tokenizer(family)
    tokenizer.save_pretrained(path)
    transformers.set_seed(seed)
    _tiny_model(FAMILIES[family].architecture, tokenizer).save_pretrained(path)
    return path


def _bytes_tokenizer(family: Family, merges: tuple[tuple[str, str], ...]) -> Tokenizer:
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", family.eos, *family.special, *filter(None, [family.bos])])
    if family.bos:
        start = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[start])
    return tokenizer


def _template_text(template: str | None) -> str | None:
    if template is None or not template.endswith(".jinja"):
        return template
    return (files("trl") / "chat_templates" / template).read_text(encoding="utf-8")


def _tiny_model(architecture: str, tokenizer: transformers.PreTrainedTokenizerFast) -> Any:
    text_only = "Text" if architecture == "Gemma3" else ""
    config = getattr(transformers, f"{architecture}{text_only}Config")(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return getattr(transformers, f"{architecture}ForCausalLM")(config)
