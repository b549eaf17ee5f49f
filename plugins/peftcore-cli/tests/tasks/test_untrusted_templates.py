"""Chat templates that came with an adapter: Jinja's sandbox holds, sizes are limited, and errors end in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peftcore_cli.bases import models
from peftcore_cli.bases.adapter_folders import TASK_FILE, adapter_task
from peftcore_cli.tasks import conversations
from safetensors.torch import save_file
from support.commands import save_tokenizer
from transformers import AutoTokenizer

from peftcore import CheckpointError, PeftcoreError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi, ' \" \u2028 é"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1.5}}}]},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is nested too deeply"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "is nested too deeply"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "is nested too deeply"),
        ("{{ nothing.here }}", "rejects the conversation: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "rejects the conversation: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "rejects the conversation: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "rejects the conversation: "),
        ("{% for i in range(10**6) %}{% endfor %}", "rejects the conversation: Range too big"),
        ("{% include '/etc/passwd' %}", "rejects the conversation: no loader"),
        ("{{", "rejects the conversation: "),
        ("{{ '\\ud800' }}", "writes an unpaired surrogate, which is not valid Unicode"),
    ],
    ids=lambda value: value[:30],
)
def test_a_template_that_fails_is_an_error_that_says_so(tokenizer: Any, template: str, message: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(PeftcoreError, match="the chat template ") as error:
        conversations.render(tokenizer, TALK)
    assert message in str(error.value) and "--chat-template chatml" in str(error.value) and len(str(error.value)) < 600


def test_a_template_of_more_than_a_million_characters_is_not_read(tmp_path: Path) -> None:
    long = "{# " + "x" * 2_000_000 + " #}"
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(long)
    with pytest.raises(PeftcoreError, match=r"chat_template has 2,000,006 characters, but the limit is 1,000,000"):
        models.load_tokenizer("base", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({}, tmp_path / "adapter_model.safetensors")
    task = {"task": "causal-lm", "max_length": 7, "labels": [], "chat_template": long}
    (tmp_path / TASK_FILE).write_text(json.dumps(task))
    with pytest.raises(CheckpointError, match=r"chat_template has 2,000,006 characters, but the limit is 1,000,000"):
        adapter_task(tmp_path)


def test_the_users_template_counts_before_the_adapters(tokenizer: Any, tmp_path: Path) -> None:
    for given, of_adapter, text in (
        ("{{ 1 }}", "{{ 2 }}", "{{ 1 }}"),
        (None, "{{ 2 }}", "{{ 2 }}"),
        (None, "chatml", conversations.CHATML),
        ("chatml", "{{ 2 }}", conversations.CHATML),
    ):
        conversations.set_template(tokenizer, given, of_adapter)
        assert tokenizer.chat_template == text
    file = tmp_path / "template"
    file.write_text("{{ 3 }}")
    conversations.set_template(tokenizer, str(file), "{{ 2 }}")
    assert tokenizer.chat_template == "{{ 3 }}"


@pytest.mark.parametrize(
    "template", ["/etc/hostname", "~/.netrc", "notes.txt", "/dev/zero", "", "a\0b", 3, ["{{ 1 }}"]]
)
def test_a_folder_names_no_file_as_its_template(tmp_path: Path, template: Any) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({}, tmp_path / "adapter_model.safetensors")
    fields = {"task": "causal-lm", "max_length": 7, "labels": [], "chat_template": template}
    (tmp_path / TASK_FILE).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=rf"cannot read '.*{TASK_FILE}': chat_template.*Delete the file"):
        adapter_task(tmp_path)
    for right in (None, "chatml", "{{ 1 }}"):
        (tmp_path / TASK_FILE).write_text(json.dumps({**fields, "chat_template": right}))
        assert adapter_task(tmp_path).chat_template == right
