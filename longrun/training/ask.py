"""Ask the model one question, as any program would that loads current_model/ with from_pretrained."""

from __future__ import annotations

import sys
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 80


def ask(folder: str, question: str) -> str:
    """The model's answer, decoded greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt: Any = tokenizer.apply_chat_template(messages, **options)
    output = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    print(ask(sys.argv[1], sys.argv[2]))  # noqa: T201
