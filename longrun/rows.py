"""What one row of a dropped file says, whatever format it came in.

Five formats are read; three kinds of row leave this floor, and they differ only in which tokens are trained:

    messages, conversations, instruction   ->  ChatRow        the assistant's turns
    prompt + completion                    ->  CompletionRow  the completion
    text                                   ->  TextRow        everything
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class RowFormat(StrEnum):
    """How the rows of a file are spelled; one format a file."""

    MESSAGES = "messages"  # OpenAI chat, optional `tools`
    PROMPT_COMPLETION = "prompt/completion"  # strings, or message lists on both sides
    TEXT = "text"
    SHAREGPT = "conversations"  # [{"from": "human", "value": ...}]
    ALPACA = "instruction"  # instruction, optional input, output


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRow:
    """A conversation. Trained: the assistant's turns from message number `train_from` on."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    train_from: int = 0  # prompt/completion rows given as message lists train only the completion's turns


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRow:
    """Plain text with a part that is only read. Trained: the completion and the end-of-text token."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """Plain text. Trained: all of it and the end-of-text token."""

    text: str


Row = ChatRow | CompletionRow | TextRow
