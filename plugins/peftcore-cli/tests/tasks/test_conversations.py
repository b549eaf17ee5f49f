"""Conversations as tokens: which of them are learned, under templates of several kinds."""

from __future__ import annotations

import re
from typing import Any

import pytest
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import conversations
from peftcore_cli.tasks.registered import find
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peftcore import PeftcoreError

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, you."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Fine."},
]
CHATML = conversations.CHATML
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
# As Qwen3's: the thoughts of earlier turns are left out once another follows.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As DeepSeek-R1's: what begins an answer is not what stands before a turn that was made.
BEGINS_OTHERWISE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant><think>' }}{% endif %}"
)
REWRITES = "{{ messages | length }}{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"


@pytest.fixture
def tokenizer() -> Any:
    """A token a byte, and those that mark turns."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def learned(tokenizer: Any, template: str, **fields: Any) -> list[str]:
    """What is learned in each example."""
    conversations.set_template(tokenizer, template)
    examples = conversations.encode(Row("f:1", "", messages=TALK, **fields), tokenizer)
    return [tokenizer.decode([token for token in example["labels"] if token >= 0]) for example in examples]


def test_answers_and_what_ends_them_are_learned(tokenizer: Any) -> None:
    assert learned(tokenizer, "chatml") == ["Hello, you.<|im_end|>Fine.<|im_end|>"]
    assert learned(tokenizer, LLAMA2) == [" Hello, you.</s> Fine.</s>"]


def test_of_a_prompt_and_its_completion_the_completion_is_learned(tokenizer: Any) -> None:
    assert learned(tokenizer, "chatml", learned_from=2) == ["Fine.<|im_end|>"]


def test_a_template_that_leaves_thoughts_out_makes_an_example_of_each_turn(tokenizer: Any) -> None:
    assert learned(tokenizer, THINKING) == ["<think></think>Hello, you.<|im_end|>", "<think></think>Fine.<|im_end|>"]


def test_a_template_without_a_mark_at_the_end_is_given_one(tokenizer: Any) -> None:
    assert learned(tokenizer, BEGINS_OTHERWISE) == ["Hello, you.Fine.</s>"]


def test_a_template_that_rewrites_what_came_before_is_refused(tokenizer: Any) -> None:
    with pytest.raises(PeftcoreError, match=r"f:1: the chat template rewrites earlier turns when messages\[1\]"):
        learned(tokenizer, REWRITES)


def test_equals_the_marks_of_a_template_that_has_them(tokenizer: Any) -> None:
    marked = CHATML.replace(
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}",
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    tokenizer.chat_template = marked
    wanted = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    (found,) = conversations.encode(Row("f:1", "", messages=TALK), tokenizer)
    assert found["input_ids"] == wanted["input_ids"]
    assert [label != -100 for label in found["labels"]] == [mask == 1 for mask in wanted["assistant_masks"]]


def test_tools_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ tools[0]['name'] if tools else 'none' }}|" + CHATML
    row = Row("f:1", "", messages=TALK, tools=[{"name": "weather"}])
    (example,) = conversations.encode(row, tokenizer)
    assert tokenizer.decode(example["input_ids"]).startswith("weather|")


def test_no_template_is_an_error_that_names_one(tokenizer: Any) -> None:
    with pytest.raises(PeftcoreError, match=r"f:1: the tokenizer of '.*' has no chat template.*--chat-template chatml"):
        conversations.encode(Row("f:1", "", messages=TALK), tokenizer)
    with pytest.raises(PeftcoreError, match=re.escape("cannot read --chat-template 'nowhere.jinja'")):
        conversations.set_template(tokenizer, "nowhere.jinja")


def test_what_a_template_refuses_is_reported(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('only two turns') }}"
    with pytest.raises(PeftcoreError, match="f:1: the chat template rejects the conversation: only two turns"):
        conversations.encode(Row("f:1", "", messages=TALK), tokenizer)


def test_a_conversation_too_long_is_cut_or_left_out(tokenizer: Any) -> None:
    conversations.set_template(tokenizer, "chatml")
    rows = [Row("f:1", "", messages=TALK), Row("f:2", "", messages=[{"role": "user", "content": "x" * 90}, *TALK[1:]])]
    found = find("causal-lm").encode(rows, tokenizer, 60)
    assert (found.truncated, found.left_out, len(found.examples)) == (2, 1, 1)
    assert len(found.examples[0]["input_ids"]) == 60
    with pytest.raises(
        PeftcoreError,
        match=r"no conversation has an answer within 8 tokens\. Increase "
        r"--max-length",
    ):
        find("causal-lm").encode(rows, tokenizer, 8)


def test_turns_that_are_marked_are_read_and_not_learned(tokenizer: Any) -> None:
    assert learned(tokenizer, "chatml", not_learned=(1,)) == ["Fine.<|im_end|>"]
    assert learned(tokenizer, "chatml", not_learned=(3,)) == ["Hello, you.<|im_end|>"]


CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
KNOWS = (
    "{{ tools | tojson if tools }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m.tool_calls | tojson if m.tool_calls else m['content'] }}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_tools_that_a_template_does_not_write_are_refused(tokenizer: Any) -> None:
    assert learned(tokenizer, KNOWS, tools=CALL) == ["Hello, you.<|im_end|>Fine.<|im_end|>"]
    with pytest.raises(PeftcoreError, match=r"f:1: the chat template ignores tools\. Pass a template"):
        learned(tokenizer, "chatml", tools=CALL)


def test_calls_of_tools_that_a_template_does_not_write_are_refused(tokenizer: Any) -> None:
    asked = {"role": "user", "content": "Hi"}
    for call in ({"role": "assistant", "tool_calls": CALL}, {"role": "assistant", "content": "", "tool_calls": CALL}):
        row = Row("f:1", "", messages=[asked, call])
        conversations.set_template(tokenizer, KNOWS)
        (example,) = conversations.encode(row, tokenizer)
        text = tokenizer.decode([token for token in example["labels"] if token >= 0])
        assert text.startswith('[{"type": "function"') and text.endswith("<|im_end|>")
        conversations.set_template(tokenizer, "{% for m in messages %}{{ m['role'] }}{{ m['content'] }}{% endfor %}")
        with pytest.raises(PeftcoreError, match=r"f:1: the chat template ignores the tool_calls of messages\[1\]"):
            conversations.encode(row, tokenizer)
