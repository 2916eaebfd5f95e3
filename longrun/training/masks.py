"""From one row to token ids, and which of them are trained.

    TextRow         <bos> text <eos>                 trained: all of it
    CompletionRow   <bos> prompt completion <eos>    trained: completion and <eos>
    ChatRow         the chat template's text         trained: the assistant's turns, their end tokens included

Which part of a rendered conversation the assistant wrote is told by the first of these that can:

    1. the `{% generation %}` markers of the model's own chat template
    2. those of TRL's training template for the model's family
    3. prefix differences: what each assistant turn adds to its generation prompt, proven turn by turn

If none can, the row is refused: training on guessed spans would teach the model to write the user's part.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property, lru_cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from longrun.errors import BadFile
from longrun.rows import ChatRow, CompletionRow, Row, TextRow

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # cross entropy's own "no target here"
# What day it is for templates that write it down (Llama 3, gpt-oss): a file must give the same tokens on any day. It is
# the one that Llama 3's own has for want of a clock.
TODAY = datetime(2024, 7, 26, tzinfo=UTC)
_ASKS_THE_DAY = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")

Messages = list[dict[str, Any]]
Span = tuple[int, int]  # characters of the rendered text, the end excluded

# As TRL's has_generation_markers, whose import takes seconds.
_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# A template is a program that came with the model: besides its own refusals it fails like any Python on a
# message without the key, or with the type, that it reads.
_TEMPLATE_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError)

_WITHOUT_MASKS = "Use prompt/completion rows, or give the model a chat template with {% generation %} markers"


class MaskSource(StrEnum):
    """How the assistant's part of a conversation is told, in words for the log."""

    OWN_MARKERS = "the template's own generation markers"
    TRAINING_TEMPLATE = "TRL's training template for this family"
    PREFIX_DIFFERENCES = "comparing each turn with its prompt"
    NONE = "no chat template"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as the model sees it."""

    input_ids: list[int]
    labels: list[int]  # input_ids where trained, IGNORED elsewhere
    truncated: bool  # cut at max_length

    @property
    def trained_tokens(self) -> int:
        """How many tokens are predicted; the first never is, since nothing comes before it."""
        return len(self.labels) - self.labels.count(IGNORED) - (self.labels[:1] not in ([], [IGNORED]))


@dataclass(frozen=True, slots=True)
class Draft:
    """A row as text, before it is tokens."""

    texts: tuple[str, ...]
    assemble: Callable[..., Ids]  # of the Encoding of each text (without offsets where the tokenizer knows none)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one text."""

    ids: list[int]
    encoding: Any  # tokenizers.Encoding; None for a tokenizer that does not say where its tokens stand

    def start(self, number: int) -> int:
        """The character where a token starts; of tokens in order it never falls.

        Some tokenizers (GPT-NeoX) trim the whitespace off a token's offsets, hence its start is where the token
        before it ended; but the tokens of one character all have that character's offsets.
        """
        start, _ = self.encoding.token_to_chars(number)
        _, reached = self.encoding.token_to_chars(number - 1) if number else (0, 0)
        return min(int(start), int(reached))


Ids = tuple[list[int], list[int]]  # input_ids, labels


class Encoder:
    """Encodes rows for one model, with at most `max_length` tokens a row, or fewer where the model takes fewer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        self._tokenizer = tokenizer
        # A tokenizer that knows of no limit of its model says so by a number beyond any length.
        self.max_length = min(max_length, tokenizer.model_max_length)
        self._start = _tokens_put_before(tokenizer)
        self._backend = _backend_of(tokenizer)
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    @property
    def takes_threads(self) -> bool:
        """Whether `tokenise` may be called by several threads at once."""
        return self._backend is not None

    def encode(self, row: Row) -> Encoded:
        """Tokens and labels of a row, cut at `max_length`; BadFile where they cannot be told exactly."""
        [encoded] = self.tokenise([self.draft(row)])
        return encoded

    def draft(self, row: Row) -> Draft:
        """The first half of `encode`: what Python does, a row at a time, and one thread only.

        Where a template marks the assistant's part, transformers notes the marks on the template it has compiled
        and keeps for all, so two renderings at once are given each other's, or none.
        """
        match row:
            case ChatRow():
                text, spans = self._template.text_and_spans(row)
                # The template writes the start token itself where the model wants one.
                return Draft((text,), lambda tokens: (tokens.ids, _labels(tokens, spans)))
            case CompletionRow():
                # As at inference, where the prompt ends before the model begins.
                return Draft((row.prompt, "\n" + row.completion), partial(self._completion, row))
            case TextRow():
                return Draft((row.text,), self._text)

    def tokenise(self, drafts: Sequence[Draft]) -> list[Encoded]:
        """The other half: one call of the tokenizer, during most of which other threads of Python go on."""
        tokens = iter(self._tokens([text for draft in drafts for text in draft.texts]))
        assembled = [draft.assemble(*islice(tokens, len(draft.texts))) for draft in drafts]
        return [self._cut(*found) for found in assembled]

    def _cut(self, ids: list[int], labels: list[int]) -> Encoded:
        if len(ids) <= self.max_length:
            return Encoded(ids, labels, truncated=False)
        return Encoded(ids[: self.max_length], labels[: self.max_length], truncated=True)

    @property
    def mask_source(self) -> str:
        """How the masks of chat rows come about, for the log."""
        return self._template.mask_source.value

    @cached_property
    def _template(self) -> _Template:
        return _Template(self._tokenizer)

    def _completion(self, row: CompletionRow, prompt: Tokens, line: Tokens) -> Ids:
        read = self._started(prompt.ids)
        written = self._ended(self._continuation(row.completion, line.ids))
        return read + written, [IGNORED] * len(read) + written

    def _continuation(self, text: str, line: list[int]) -> list[int]:
        """Tokens of `text` where it goes on from other text; `line` has those of it behind a newline.

        SentencePiece tokenizers put a space before whatever starts a string, so "Paris" after "is: " would be
        learned as " Paris"; behind a newline they do not.
        """
        newline = self._newline
        return line[len(newline) :] if line[: len(newline)] == newline else self._tokens([text])[0].ids

    @cached_property
    def _newline(self) -> list[int]:
        return self._tokens(["\n"])[0].ids

    def _text(self, text: Tokens) -> Ids:
        ids = self._started(self._ended(text.ids))
        return ids, ids

    def _tokens(self, texts: list[str]) -> list[Tokens]:
        if self._backend is not None:
            return [Tokens(found.ids, found) for found in self._backend.encode_batch(texts, add_special_tokens=False)]
        found = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        encodings = found.encodings or [None] * len(texts)
        return [Tokens(*of_a_text) for of_a_text in zip(found["input_ids"], encodings, strict=True)]

    def _started(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self._start)] == self._start else self._start + ids

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == self._end else ids + self._end


class _Template:
    """A model's chat template: the text of a conversation, and which of it the assistant wrote."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.mask_source, self._training_template = _choose_mask_source(tokenizer)

    def text_and_spans(self, row: ChatRow) -> tuple[str, list[Span]]:
        """The rendered conversation and the parts of it that are trained."""
        self._check_chat_is_possible()
        turns = _trained_turns(row)
        if self.mask_source is MaskSource.PREFIX_DIFFERENCES:
            text = self._render(row, row.messages)
            spans = [self._difference(row, turn, text) for turn in turns]
        else:
            text, spans = self._render_marked(row)
            spans = self._marked_from(row, turns[0], text, spans) if turns else []
        _check_turns_are_trained(row, turns, "".join(text[start:end] for start, end in spans))
        return text, spans

    def _difference(self, row: ChatRow, turn: int, text: str) -> Span:
        """What message number `turn` adds to its generation prompt."""
        before = self._render(row, row.messages[:turn], prompt=True)
        after = self._render(row, row.messages[: turn + 1])
        if after.startswith(before) and text.startswith(after):
            return len(before), len(after)
        raise BadFile(
            "this model's chat template rewrites earlier turns, so what is trained cannot be told exactly",
            field=f"messages[{turn}]",
            hint=_WITHOUT_MASKS,
        )

    def _marked_from(self, row: ChatRow, turn: int, text: str, spans: list[Span]) -> list[Span]:
        """The marked spans of message number `turn`, an assistant's, and of those after it."""
        assistants = [index for index, message in enumerate(row.messages) if _is_assistant(message)]
        if turn == assistants[0]:
            return spans
        before = self._render(row, row.messages[:turn], prompt=True)
        if text.startswith(before):
            # By where they end: Qwen2.5's markers start a newline before the generation prompt ends.
            return [span for span in spans if span[1] > len(before)]
        if len(spans) == len(assistants):
            return spans[assistants.index(turn) :]
        raise BadFile(
            "this model's chat template rewrites earlier turns, so the completion cannot be told apart",
            field=f"messages[{turn}]",
            hint="Use messages rows, which train every assistant turn, or prompt and completion as strings",
        )

    def _render(self, row: ChatRow, messages: Messages, *, prompt: bool = False) -> str:
        """The messages as text; with `prompt`, up to where the assistant is to go on."""
        texts, _ = self._run(row, messages, add_generation_prompt=prompt)
        text: str = texts[0]
        return text

    def _render_marked(self, row: ChatRow) -> tuple[str, list[Span]]:
        """The conversation, and what the template marks as the assistant's.

        apply_chat_template(return_assistant_tokens_mask=True) would also map it to tokens, but of a last
        character made of several it takes only the first, and where a span ends in the row's first token it
        goes on to the end of the row (transformers 5.17 and 5.23).
        """
        texts, spans = self._run(row, row.messages, return_assistant_tokens_mask=True)
        return texts[0], spans[0]

    def _run(self, row: ChatRow, messages: Messages, **options: bool) -> Any:
        variables: dict[str, Any] = {"tools": row.tools, **self._tokenizer.special_tokens_map, **options}
        try:
            return render_jinja_template(
                conversations=[_without_nulls(messages)],
                chat_template=_on_one_day(self._tokenizer.get_chat_template(self._training_template, row.tools)),
                **variables,
            )
        except _TEMPLATE_FAILURES as error:
            raise BadFile(
                f"this model's chat template does not take this conversation: {error}",
                field="messages",
                hint="Change the messages to what it takes, or use prompt/completion rows",
            ) from error

    def _check_chat_is_possible(self) -> None:
        if self.mask_source is MaskSource.NONE:
            raise BadFile(
                "this base model has no chat template",
                field="messages",
                hint="Use an instruct model, or prompt/completion or text rows",
            )
        if not self._tokenizer.is_fast:
            raise BadFile(
                "this model's tokenizer does not say which characters its tokens stand for, "
                "so the assistant's cannot be told",
                field="messages",
                hint="Use a model with a tokenizer.json, or prompt/completion or text rows",
            )


def _choose_mask_source(tokenizer: PreTrainedTokenizerBase) -> tuple[MaskSource, str | None]:
    """How masks come about, and the template to train with where it is not the model's own."""
    if tokenizer.chat_template is None:
        return MaskSource.NONE, None
    if _has_markers(tokenizer):  # TRL would ask more of them than we do: that no turn is ever rewritten
        return MaskSource.OWN_MARKERS, None
    # Here because with torch it takes seconds, which many files do without.
    from trl.chat_template_utils import get_training_chat_template

    try:
        return MaskSource.TRAINING_TEMPLATE, get_training_chat_template(tokenizer)
    except _TEMPLATE_FAILURES:  # unknown to TRL
        return MaskSource.PREFIX_DIFFERENCES, None


def _has_markers(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return _MARKER.search(tokenizer.get_chat_template()) is not None
    except ValueError:  # it has several, and none for conversations without tools
        return False


@lru_cache
def _on_one_day(template: str) -> str:
    """The template with its dates written in."""
    return _ASKS_THE_DAY.sub(lambda asked: json.dumps(TODAY.strftime(asked[2])), template)


def _check_turns_are_trained(row: ChatRow, turns: list[int], trained: str) -> None:
    """A template may drop what it has no place for, and markers may enclose the wrong thing, or nothing."""
    position = 0
    for turn in turns:
        for key, words in _said(row.messages[turn]):
            found = trained.find(words, position)
            if found < 0:
                raise BadFile(
                    "this model's chat template drops or rewrites this, so it would not be trained",
                    field=f"messages[{turn}].{key}",
                    extract=words[:80],
                    hint=_WITHOUT_MASKS,
                )
            position = found + len(words)


def _said(message: dict[str, Any]) -> list[tuple[str, str]]:
    """What a turn must be seen to say, and under which key: the tools it calls, else its answer.

    Not its reasoning, nor words beside a call: good templates move or drop those, at inference too.
    """
    if calls := message.get("tool_calls"):
        return [("tool_calls", call.get("function", call)["name"]) for call in calls]
    content = message.get("content")
    return [("content", content.rpartition("</think>")[2].strip())] if isinstance(content, str) else []


def _labels(tokens: Tokens, spans: list[Span]) -> list[int]:
    """A token is trained if its first character is within a span.

    One that begins before a span began in what the model is given: it never has to write that token. One that
    ends after a span must be written to write the span's last characters.
    """
    numbers = range(len(tokens.ids))
    labels = [IGNORED] * len(tokens.ids)
    for start, end in spans:
        first, behind = (bisect_left(numbers, border, key=tokens.start) for border in (start, end))
        labels[first:behind] = tokens.ids[first:behind]
    return labels


def _trained_turns(row: ChatRow) -> list[int]:
    return [n for n, message in enumerate(row.messages) if n >= row.train_from and _is_assistant(message)]


def _is_assistant(message: dict[str, Any]) -> bool:
    return bool(message["role"] == "assistant")


def _without_nulls(messages: Messages) -> Messages:
    """Templates take a missing key better than None, which some of them write out as a word."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _backend_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizers.Tokenizer behind it, where that is all that a call goes through; else None.

    It takes calls from several threads at once. A call of what is around it does not: that may set padding and
    truncation anew each time, and ends in "Already borrowed" (huggingface/transformers issue 47085).
    """
    if not tokenizer.is_fast:
        return None
    texts = [" two\n words", "".join(tokenizer.all_special_tokens), "\N{EURO SIGN}1"]
    called = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # leaves it without padding
    backend = tokenizer.backend_tokenizer
    return backend if [one.ids for one in backend.encode_batch(texts, add_special_tokens=False)] == called else None


def _tokens_put_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: the start token or nothing."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids: list[int] = encoded["input_ids"]
    return ids[: encoded["special_tokens_mask"].index(0)]
