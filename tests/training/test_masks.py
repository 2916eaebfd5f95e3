"""What is trained, read back: each test decodes exactly the tokens that carry a label."""

from __future__ import annotations

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, tzinfo
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trl.chat_template_utils
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from longrun.errors import BadFile
from longrun.rows import ChatRow, CompletionRow, TextRow
from longrun.training import masks
from longrun.training.masks import IGNORED, Encoded, Encoder, MaskSource

from .templates import FAMILIES, FORGETFUL, MARKED, random_weights_folder, tiny_tokenizer

if TYPE_CHECKING:
    from longrun.rows import Row

USER = {"role": "user", "content": "Où?"}
ANSWER = {"role": "assistant", "content": "À Zürich → 東京 🗼"}
SECOND_USER = {"role": "user", "content": "And then?"}
SECOND_ANSWER = {"role": "assistant", "content": "Home."}
SYSTEM = {"role": "system", "content": "Be brief."}
TWO_TURNS = [USER, ANSWER, SECOND_USER, SECOND_ANSWER]

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
CALLING = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}

# What each family trains around an assistant's words.
AROUND = {
    "qwen3": ("<think>\n\n</think>\n\n", "<|im_end|>\n"),
    "qwen2_5": ("\n", "<|im_end|>\n"),  # TRL's markers start within the generation prompt
    "llama3": ("", "<|eot_id|>"),
    "llama3_2": ("", "<|eot_id|>"),
    "gemma": ("", "<end_of_turn>\n"),
    "gemma3": ("", "<end_of_turn>\n"),
    "phi3": ("", "<|end|>\n"),
    "smollm2": ("", "<|im_end|>\n"),
    "marked": ("", "<|im_end|>"),
    "plain": ("", "</s>\n"),
    "forgetful": ("", "</s>"),
}
ENDS_THE_TEXT = {"phi3": "<|endoftext|>"}  # after the last turn only

SOURCES = {
    "qwen3": MaskSource.TRAINING_TEMPLATE,
    "qwen2_5": MaskSource.TRAINING_TEMPLATE,
    "llama3": MaskSource.TRAINING_TEMPLATE,
    "llama3_2": MaskSource.PREFIX_DIFFERENCES,
    "gemma": MaskSource.TRAINING_TEMPLATE,
    "gemma3": MaskSource.TRAINING_TEMPLATE,
    "phi3": MaskSource.TRAINING_TEMPLATE,
    "smollm2": MaskSource.PREFIX_DIFFERENCES,
    "marked": MaskSource.OWN_MARKERS,
    "plain": MaskSource.PREFIX_DIFFERENCES,
    "forgetful": MaskSource.PREFIX_DIFFERENCES,
    "base": MaskSource.NONE,
}


def encode(tokenizer: PreTrainedTokenizerFast, row: Row, *, max_length: int = 1_000_000) -> Encoded:
    return Encoder(tokenizer, max_length=max_length).encode(row)


def trained_parts(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> list[str]:
    """The unbroken runs of trained tokens, decoded."""
    runs = groupby(encoded.labels, key=lambda label: label != IGNORED)
    return [tokenizer.decode(list(run)) for is_trained, run in runs if is_trained]


def trained(family: str, row: Row, **options: Any) -> list[str]:
    tokenizer = tiny_tokenizer(family, **options)
    encoded = encode(tokenizer, row)
    assert all(label in (token, IGNORED) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    return trained_parts(tokenizer, encoded)


def rendered(family: str, row: Row) -> str:
    tokenizer = tiny_tokenizer(family)
    return tokenizer.decode(encode(tokenizer, row).input_ids)


def turn(family: str, message: dict[str, Any], *, last: bool = False) -> str:
    before, after = AROUND[family]
    return before + message["content"] + after + (ENDS_THE_TEXT.get(family, "") if last else "")


def refusal(family: str, row: ChatRow, **options: Any) -> BadFile:
    with pytest.raises(BadFile) as refused:
        trained(family, row, **options)
    return refused.value


# Where masks come from


@pytest.mark.parametrize("family", FAMILIES)
def test_the_log_can_name_where_masks_come_from(family: str) -> None:
    assert Encoder(tiny_tokenizer(family), max_length=8).mask_source == SOURCES[family]


# Conversations


@pytest.mark.parametrize("family", AROUND)
def test_a_single_turn_trains_the_answer_and_its_end(family: str) -> None:
    assert trained(family, ChatRow(messages=[USER, ANSWER])) == [turn(family, ANSWER, last=True)]


@pytest.mark.parametrize("family", AROUND)
def test_every_assistant_turn_is_trained(family: str) -> None:
    both = [turn(family, ANSWER), turn(family, SECOND_ANSWER, last=True)]
    assert trained(family, ChatRow(messages=TWO_TURNS)) == both


@pytest.mark.parametrize("family", sorted(AROUND.keys() - {"gemma", "forgetful"}))
def test_a_system_prompt_is_read_and_not_trained(family: str) -> None:
    row = ChatRow(messages=[SYSTEM, USER, ANSWER])
    assert "Be brief." in rendered(family, row)
    assert trained(family, row) == [turn(family, ANSWER, last=True)]


@pytest.mark.parametrize("family", AROUND)
def test_turns_before_train_from_are_only_read(family: str) -> None:
    row = ChatRow(messages=TWO_TURNS, train_from=3)
    assert "Zürich" in rendered(family, row)
    assert trained(family, row) == [turn(family, SECOND_ANSWER, last=True)]


@pytest.mark.parametrize("family", AROUND)
def test_train_from_may_name_the_message_before_the_turn(family: str) -> None:
    row = ChatRow(messages=TWO_TURNS, train_from=2)
    assert trained(family, row) == [turn(family, SECOND_ANSWER, last=True)]


@pytest.mark.parametrize("family", ["qwen3", "smollm2"])
def test_without_a_turn_from_train_from_on_nothing_is_trained(family: str) -> None:
    assert trained(family, ChatRow(messages=[*TWO_TURNS, USER], train_from=4)) == []


@pytest.mark.parametrize("family", AROUND)
def test_the_start_token_is_never_doubled(family: str) -> None:
    ids = encode(tiny_tokenizer(family), ChatRow(messages=TWO_TURNS)).input_ids
    start = tiny_tokenizer(family).bos_token_id
    assert ids.count(start) == (start is not None)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5"])
def test_a_tool_call_and_the_answer_to_its_result_are_trained(family: str) -> None:
    before, after = AROUND[family]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    row = ChatRow(messages=CALLING, tools=[TOOL])
    assert "Weather of a city" in rendered(family, row)
    assert trained(family, row) == [before + call + after, before + "It rains." + after]


def test_a_tool_call_is_trained_by_prefix_differences_too() -> None:
    assert trained("llama3_2", ChatRow(messages=CALLING, tools=[TOOL])) == [
        '{"name": "weather", "parameters": {"city": "Köln"}}<|eot_id|>',
        "It rains.<|eot_id|>",
    ]


def test_the_turn_after_a_tool_call_can_be_trained_alone() -> None:
    row = ChatRow(messages=CALLING, tools=[TOOL], train_from=3)
    assert trained("qwen2_5", row) == ["\nIt rains.<|im_end|>\n"]


def test_reasoning_beside_the_content_is_trained() -> None:
    thought = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2 → 4"}
    assert trained("qwen3", ChatRow(messages=[USER, thought])) == ["<think>\n2 + 2 → 4\n</think>\n\n4<|im_end|>\n"]


def test_reasoning_within_the_content_is_trained_in_every_turn() -> None:
    first = {"role": "assistant", "content": "<think>\none\n</think>\n\n1"}
    second = {"role": "assistant", "content": "<think>\ntwo\n</think>\n\n2"}
    assert trained("qwen3", ChatRow(messages=[USER, first, SECOND_USER, second])) == [
        "<think>\none\n</think>\n\n1<|im_end|>\n",
        "<think>\ntwo\n</think>\n\n2<|im_end|>\n",
    ]


def test_null_values_are_as_if_they_were_not_there() -> None:
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    answer = {**ANSWER, "tool_calls": None, "reasoning_content": None}
    row = ChatRow(messages=[USER, calling, CALLING[2], answer], tools=[TOOL])
    assert trained("llama3_2", row)[-1] == turn("llama3_2", ANSWER)


def test_messages_are_left_as_they_were() -> None:
    messages = [dict(message) for message in TWO_TURNS]
    trained("gemma3", ChatRow(messages=messages))
    assert messages == TWO_TURNS


# Which tokens a span is


def test_a_marked_span_that_ends_with_several_byte_tokens_is_trained_whole() -> None:
    marks_content_only = MARKED.replace(
        "message.content + '<|im_end|>' }}{%- endgeneration %}",
        "message.content }}{%- endgeneration %}{{- '<|im_end|>' }}",
    )
    row = ChatRow(messages=[USER, {"role": "assistant", "content": "漢"}, SECOND_USER])
    assert trained("marked", row, template=marks_content_only) == ["漢"]


def test_a_marked_span_that_is_the_first_token_ends_there() -> None:
    bare = (
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    )
    row = ChatRow(messages=[{"role": "assistant", "content": "y"}, USER])
    assert trained("marked", row, template=bare) == ["y"]


def test_a_token_that_begins_before_the_span_is_not_trained() -> None:
    # "assistant: " ends in the space that the answer's first token begins with.
    row = ChatRow(messages=[USER, {"role": "assistant", "content": "Yes"}])
    assert trained("plain", row, merges=(("Ġ", "Y"),)) == ["es</s>\n"]


def test_a_token_that_begins_in_the_span_and_ends_after_it_is_trained() -> None:
    question_first = "{% for message in messages %}{{ message.role[0] + ': ' + message.content }}{% endfor %}"
    row = ChatRow(messages=[USER, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "?"}])
    template = question_first + "{% if add_generation_prompt %}a: {% endif %}"
    assert trained("plain", row, template=template, merges=(("s", "u"),)) == ["Yesu"]


def test_offsets_without_their_leading_whitespace_are_told_apart() -> None:
    tokenizer = tiny_tokenizer("marked", merges=(("Ġ", "a"),))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    row = ChatRow(messages=[USER, {"role": "assistant", "content": " a \n"}, SECOND_USER])
    encoded = encode(tokenizer, row)
    assert trained_parts(tokenizer, encoded) == [" a \n<|im_end|>"]


def test_our_tokens_are_those_of_apply_chat_template() -> None:
    tokenizer = tiny_tokenizer("marked", merges=(("Ċ", "Ċ"),))
    messages = [*TWO_TURNS, {"role": "user", "content": "\n\n\n"}]
    theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ours = encode(tokenizer, ChatRow(messages=messages))
    assert ours.input_ids == theirs["input_ids"]
    assert [label != IGNORED for label in ours.labels] == [bool(mask) for mask in theirs["assistant_masks"]]


# Refusals


def test_a_conversation_needs_a_chat_template() -> None:
    refused = refusal("base", ChatRow(messages=[USER, ANSWER]))
    assert refused.why == "this base model has no chat template"
    assert "instruct model" in refused.hint


def test_gemma_takes_no_system_role_and_says_so() -> None:
    refused = refusal("gemma", ChatRow(messages=[SYSTEM, USER, ANSWER]))
    assert refused.field == "messages"
    assert "System role not supported" in refused.why


def test_gemma_wants_roles_to_alternate_and_says_so() -> None:
    refused = refusal("gemma3", ChatRow(messages=[USER, USER, ANSWER]))
    assert "Conversation roles must alternate" in refused.why
    assert "prompt/completion" in refused.hint


def test_a_content_the_template_cannot_read_is_refused() -> None:
    parts = {"role": "assistant", "content": [{"type": "text", "text": "Here."}]}
    refused = refusal("smollm2", ChatRow(messages=[USER, parts]))
    assert "does not take this conversation" in refused.why


REASONING = [
    USER,
    {"role": "assistant", "content": "<think>one</think>1"},
    SECOND_USER,
    {"role": "assistant", "content": "<think>two</think>2"},
]


def test_a_template_that_rewrites_earlier_turns_is_refused_where_it_does() -> None:
    refused = refusal("forgetful", ChatRow(messages=REASONING))
    assert refused.field == "messages[1]"
    assert "rewrites earlier turns" in refused.why
    assert "{% generation %}" in refused.hint


def test_a_template_that_rewrites_earlier_turns_trains_single_turns() -> None:
    assert trained("forgetful", ChatRow(messages=REASONING[:2])) == ["<think>one</think>1</s>"]


def test_a_template_that_rewrites_earlier_turns_trains_a_last_turn_alone() -> None:
    assert trained("forgetful", ChatRow(messages=REASONING, train_from=3)) == ["<think>two</think>2</s>"]


# As Qwen3's, with the markers that a refusal asks for: thoughts stand before the last turn, and tools can be called.
MARKED_AND_FORGETFUL = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {%- if loop.last %}{{- '<think></think>' }}{%- endif %}
            {{- message.content }}
            {%- for call in message.tool_calls or [] %}{{- '<tool_call>' + (call.function | tojson) }}{%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def test_markers_tell_what_is_trained_also_where_earlier_turns_are_rewritten() -> None:
    assert trained("marked", ChatRow(messages=TWO_TURNS), template=MARKED_AND_FORGETFUL) == [
        ANSWER["content"] + "<|im_end|>",
        "<think></think>Home.<|im_end|>",
    ]


def test_marks_that_cannot_be_told_apart_refuse_a_completion() -> None:
    marks_all_roles = FORGETFUL.replace(
        "content + eos_token }}", "'' }}{% generation %}{{ content }}{% endgeneration %}"
    )
    odd_prompt = marks_all_roles.replace("{{- '<|assistant|>' }}", "{{- '?' }}")
    refused = refusal("forgetful", ChatRow(messages=REASONING, train_from=3), template=odd_prompt)
    assert refused.field == "messages[3]"
    assert "cannot be told apart" in refused.why


def test_one_mark_a_turn_tells_the_completion_where_prompts_do_not() -> None:
    odd_prompt = MARKED.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '?' }}")
    row = ChatRow(messages=TWO_TURNS, train_from=3)
    assert trained("marked", row, template=odd_prompt) == ["Home.<|im_end|>"]


def test_markers_that_enclose_nothing_are_refused() -> None:
    hollow = MARKED.replace("{%- endgeneration %}", "").replace(
        "{%- generation %}", "{%- generation %}{%- endgeneration %}"
    )
    refused = refusal("marked", ChatRow(messages=TWO_TURNS), template=hollow)
    assert refused.field == "messages[1].content"
    assert refused.extract == ANSWER["content"]


def test_markers_within_a_macro_are_refused_because_they_point_elsewhere() -> None:
    macro = (
        "{%- macro said(message) %}<|im_start|>{{ message.role + '\\n' }}{% generation %}"
        "{{ message.content }}{% endgeneration %}<|im_end|>{% endmacro %}"
        "{%- for message in messages %}{% if message.role == 'assistant' %}{{ said(message) }}"
        "{% else %}<|im_start|>{{ message.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    assert refusal("marked", ChatRow(messages=TWO_TURNS), template=macro).field == "messages[1].content"


def test_a_tool_call_that_the_template_drops_is_refused() -> None:
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert refusal("llama3", ChatRow(messages=messages)).field == "messages[1].tool_calls"


def test_a_tokenizer_without_offsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    assert "tokenizer.json" in refusal("marked", ChatRow(messages=TWO_TURNS)).hint


# Plain text


def test_a_completion_is_trained_and_its_prompt_only_read() -> None:
    row = CompletionRow(prompt="Où? ", completion="Zürich → 東京")
    assert rendered("base", row) == "<s>Où? Zürich → 東京</s>"
    assert trained("base", row) == ["Zürich → 東京</s>"]


def test_a_prompt_keeps_the_tokens_it_has_alone() -> None:
    tokenizer = tiny_tokenizer("base", merges=(("Ġ", "Z"),))
    ids = encode(tokenizer, CompletionRow(prompt="à ", completion="Z")).input_ids
    assert ids == [*tokenizer("à ")["input_ids"], *tokenizer.convert_tokens_to_ids(["Z", "</s>"])]


@pytest.mark.parametrize("completion", ["Z", " Z", "\nZ", "\n\nZ"])
def test_a_completion_gets_no_space_it_does_not_have(completion: str) -> None:
    tokenizer = sentencepiece_like_tokenizer()
    encoded = encode(tokenizer, CompletionRow(prompt="Z", completion=completion))
    assert tokenizer.decode(encoded.input_ids) == "Z" + completion


@pytest.mark.parametrize("completion", ["\nZ", "\n\nZ", "Z\n"])
def test_newlines_that_are_one_token_stay_whole(completion: str) -> None:
    row = CompletionRow(prompt="Z", completion=completion)
    assert trained("base", row, merges=(("Ċ", "Ċ"),)) == [completion + "</s>"]


@pytest.mark.parametrize("family", ["base", "smollm2"])
def test_text_is_trained_whole_between_its_start_and_end(family: str) -> None:
    start = FAMILIES[family].bos or ""
    assert trained(family, TextRow(text="Zürich → 東京 🗼")) == [start + "Zürich → 東京 🗼" + FAMILIES[family].eos]


def test_start_and_end_tokens_in_the_text_itself_are_not_doubled() -> None:
    assert trained("base", TextRow(text="<s>Oui</s>")) == ["<s>Oui</s>"]
    assert rendered("base", CompletionRow(prompt="<s>Où?", completion=" Ici</s>")) == "<s>Où? Ici</s>"


def test_a_model_without_an_end_token_trains_the_text_alone() -> None:
    tokenizer = tiny_tokenizer("base")
    tokenizer.eos_token = None
    encoded = encode(tokenizer, TextRow(text="Oui"))
    assert tokenizer.decode(encoded.input_ids) == "<s>Oui"


def test_plain_text_does_without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", None)  # importing it now raises
    assert trained("qwen3", TextRow(text="Oui")) == ["Oui<|im_end|>"]


# Length


def test_a_long_row_keeps_its_first_tokens() -> None:
    tokenizer = tiny_tokenizer("base")
    encoded = encode(tokenizer, CompletionRow(prompt="ab", completion="cd"), max_length=4)
    assert tokenizer.decode(encoded.input_ids) == "<s>abc"
    assert trained_parts(tokenizer, encoded) == ["c"]
    assert encoded.truncated


def test_a_row_of_exactly_the_length_is_not_truncated() -> None:
    row = CompletionRow(prompt="ab", completion="cd")
    encoded = encode(tiny_tokenizer("base"), row, max_length=6)
    assert len(encoded.input_ids) == 6
    assert not encoded.truncated


@pytest.mark.parametrize("family", ["qwen3", "smollm2"])
def test_a_row_cut_before_its_answer_trains_nothing(family: str) -> None:
    encoded = encode(tiny_tokenizer(family), ChatRow(messages=TWO_TURNS), max_length=5)
    assert encoded.truncated
    assert encoded.trained_tokens == 0


def test_the_first_token_does_not_count_as_trained() -> None:
    encoded = encode(tiny_tokenizer("base"), TextRow(text="ab"))
    assert encoded.labels == encoded.input_ids
    assert encoded.trained_tokens == 3  # a, b, </s>


def test_a_long_row_is_no_warning_of_the_tokenizer(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.model_max_length = 200  # TRL's trial conversation is shorter, these rows are longer
    with caplog.at_level(logging.WARNING):
        encode(tokenizer, ChatRow(messages=TWO_TURNS * 5))
        encode(tokenizer, TextRow(text="many bytes" * 30))
    assert caplog.messages == []


# One tokenizer, many threads


def test_what_a_tokenizer_file_says_of_padding_and_length_touches_no_row() -> None:
    tokenizer = tiny_tokenizer("qwen3")
    alone = encode(tokenizer, TextRow(text="many bytes"))
    tokenizer.backend_tokenizer.enable_padding(length=40)
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert encode(tokenizer, TextRow(text="many bytes")) == alone


def test_a_tokenizer_that_does_more_than_its_backend_is_called_itself() -> None:
    class Shouting(PreTrainedTokenizerFast):
        def __call__(self, text: Any, **options: Any) -> Any:
            return super().__call__(
                [one.upper() for one in text] if isinstance(text, list) else text.upper(), **options
            )

    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.__class__ = Shouting
    assert not Encoder(tokenizer, max_length=100).takes_threads
    assert tokenizer.decode(encode(tokenizer, TextRow(text="abc")).input_ids).startswith("ABC")


def test_rows_tokenised_by_several_threads_are_those_encoded_one_by_one() -> None:
    encoder = Encoder(tiny_tokenizer("qwen3"), max_length=4096)
    assert encoder.takes_threads
    rows: list[Row] = [ChatRow(messages=TWO_TURNS * (1 + number % 7)) for number in range(200)]
    rows += [CompletionRow(prompt="2 and 2 is", completion=str(number)) for number in range(200)]
    rows += [TextRow(text="many bytes " * (1 + number % 7)) for number in range(200)]
    batches = [[encoder.draft(row) for row in rows[start : start + 3]] for start in range(0, len(rows), 3)]
    with ThreadPoolExecutor(8) as pool:
        tokenised = [row for batch in pool.map(encoder.tokenise, batches) for row in batch]
    assert tokenised == [encoder.encode(row) for row in rows]


# The helpers other tests start from


def test_a_template_that_writes_the_date_down_gives_the_same_tokens_on_any_day(monkeypatch: pytest.MonkeyPatch) -> None:
    days = iter(range(1, 29))  # each time that it is asked for

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime(2030, 1, next(days), tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    row = ChatRow(messages=TWO_TURNS)
    first, second = (Encoder(tiny_tokenizer("llama3_2"), max_length=2048).encode(row) for _ in range(2))
    assert first == second
    assert "26 Jul 2024" in tiny_tokenizer("llama3_2").decode(first.input_ids)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5", "llama3", "gemma", "gemma3", "phi3", "smollm2"])
def test_a_random_weights_folder_loads_as_its_family(family: str, tmp_path: Path) -> None:
    folder = random_weights_folder(tmp_path / "model", family)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == f"{FAMILIES[family].architecture}ForCausalLM"
    assert trained_parts(tokenizer, encode(tokenizer, ChatRow(messages=TWO_TURNS)))
    assert tokenizer("<s> é 漢\n")["input_ids"] == tiny_tokenizer(family)("<s> é 漢\n")["input_ids"]


def sentencepiece_like_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a space before whatever starts a string, as Llama 2's and Mistral's do."""
    tokenizer = Tokenizer(models.BPE(vocab={"▁": 0, "Z": 1, "\n": 2}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_no_template_that_trl_has_a_better_one_for_has_markers_of_its_own():
    """Else TRL would have to be asked about those, too."""
    folder = Path(trl.chat_template_utils.__file__).with_name("chat_templates")
    replaced = [path for path in folder.glob("*.jinja") if path.with_name(f"{path.stem}_training.jinja").exists()]
    assert len(replaced) > 10
    assert not [path.name for path in replaced if masks._MARKER.search(path.read_text())]


def test_a_template_with_markers_of_its_own_is_rendered_without_waiting_for_torch():
    code = """if True:
        import sys
        from longrun.rows import ChatRow
        from longrun.training.base_model import load_tokenizer
        from longrun.training.masks import Encoder
        encoder = Encoder(load_tokenizer("tiny", trust_remote_code=False), max_length=64)
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert encoder.encode(ChatRow(messages=messages)).trained_tokens
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
