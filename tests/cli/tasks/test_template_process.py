"""Chat templates of strangers: rendered as transformers renders them, or refused in bounded time and memory."""

from __future__ import annotations

import datetime
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import Run, save_tokenizer, write_jsonl
from fuzz.corpus import limit
from transformers import AutoTokenizer

import peftcore
from peftcore import CheckpointError, PeftcoreError
from peftcore.cli.bases.adapter_folders import TASK_FILE, AdapterTask, adapter_task
from peftcore.cli.tasks import conversations, template_process

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi, ' \" \u2028 é"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1.5}}}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
# With what templates use: tools, special tokens, namespaces, macros, loop controls, generation, filters.
LONG = (
    "{%- macro shown(m) -%}{{ m.role | upper }}: {{ m['content'] | trim }}{%- endmacro -%}{{ bos_token }}"
    "{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}"
    "{% generation %}{{ shown(m) }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{% endgeneration %}{% endfor %}{{ ns.n }}{% if add_generation_prompt %}<A>{% endif %}{{ eos_token }}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def foreign(tokenizer: Any) -> None:
    """The template is a stranger's."""
    template_process.mark(tokenizer, foreign=True)


@pytest.mark.parametrize("template", [conversations.CHATML, LONG], ids=["chatml", "long"])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_it_is_rendered_as_here(tokenizer: Any, template: str, tools: Any) -> None:
    tokenizer.chat_template = template
    for begins in (False, True):
        found = conversations.rendered(tokenizer, TALK, tools, begins_answer=begins)
        template_process.mark(tokenizer, foreign=False)
        assert found == conversations.rendered(tokenizer, TALK, tools, begins_answer=begins) and len(found) > 30
        template_process.mark(tokenizer, foreign=True)


def test_values_that_are_not_json(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].at is defined }}{{ messages[0].content }}"
    message = {"role": "user", "content": "\ud83d\ude00 x", "at": datetime.date(2026, 1, 1)}
    assert conversations.rendered(tokenizer, [message]) == "True\U0001f600 x"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "took more than 0.5 s for one",
        ),
        ("{{ 10 ** (10 ** 9) }}", "took more than 0.5 s for one conversation, and was stopped. Pass another"),
        ("{{ '%1000000000d' % 1 }}", "takes more than 512 MB of memory"),
        ("{{ 'x' * 10**10 }}", "takes more than 512 MB of memory"),
        ("{{ 'x'.ljust(10**10) }}", "takes more than 512 MB of memory"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "a text of 99,999,000 characters"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is nested too deeply"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "is nested too deeply"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "is nested too deeply"),
        ("{{ nothing.here }}", "rejects the conversation: UndefinedError: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "rejects the conversation: ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "rejects the conversation: SecurityError"),
        ("{% include '/etc/passwd' %}", "rejects the conversation: TypeError: no loader"),
        ("{{", "rejects the conversation: TemplateSyntaxError"),
        ("{{ '\\ud800' }}", "produces half a surrogate pair, which is not text"),
        ("{# " + "x" * 2_000_000 + " #}", "has 2,000,006 characters, expected text of at most 1,000,000"),
    ],
    ids=lambda value: value[:30],
)
def test_what_would_not_end_is_refused(
    tokenizer: Any, template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "took" in message:
        monkeypatch.setattr(template_process, "SECONDS", 0.5)
    tokenizer.chat_template = template
    with limit(60), pytest.raises(PeftcoreError, match="the chat template ") as told:
        conversations.rendered(tokenizer, TALK)
    assert message in str(told.value) and "--chat-template chatml" in str(told.value) and len(str(told.value)) < 600
    monkeypatch.undo()
    tokenizer.chat_template = "{{ messages | length }}"  # the next one is served again
    assert conversations.rendered(tokenizer, TALK) == "3"


def test_a_process_that_is_gone_is_started_again(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}"
    assert conversations.rendered(tokenizer, TALK) == "3"
    os.kill(template_process.process_id(), signal.SIGKILL)
    for _ in range(100):
        try:
            assert conversations.rendered(tokenizer, TALK) == "3"
            break
        except PeftcoreError as error:
            assert "ended the process that renders it (-9)" in str(error)


@pytest.mark.parametrize("template", ["{% for i in 3 %}{% endfor %}", "{{ 1 / 0 }}", "{{", "{{ " + "(" * 3000 + " }}"])
def test_a_template_of_the_users_ends_in_a_sentence_too(tokenizer: Any, template: str) -> None:
    conversations.set_template(tokenizer, template)
    assert not template_process.is_foreign(tokenizer)
    with pytest.raises(PeftcoreError, match=r"the chat template (rejects the conversation|is nested)"):
        conversations.rendered(tokenizer, TALK)


def test_the_users_template_counts_before_the_adapters(tokenizer: Any, tmp_path: Path) -> None:
    for given, of_adapter, text, foreign in (
        ("{{ 1 }}", "{{ 2 }}", "{{ 1 }}", False),
        (None, "{{ 2 }}", "{{ 2 }}", True),
        ("{{ 2 }}", "{{ 2 }}", "{{ 2 }}", True),  # a run that goes on has it from the adapter
        (None, "chatml", conversations.CHATML, False),
        ("chatml", "{{ 2 }}", conversations.CHATML, False),
    ):
        conversations.set_template(tokenizer, given, of_adapter)
        assert tokenizer.chat_template == text and template_process.is_foreign(tokenizer) == foreign
    file = tmp_path / "template"
    file.write_text("{{ 3 }}")
    conversations.set_template(tokenizer, str(file), "{{ 2 }}")
    assert tokenizer.chat_template == "{{ 3 }}" and not template_process.is_foreign(tokenizer)


@pytest.mark.parametrize(
    "template", ["/etc/hostname", "~/.netrc", "notes.txt", "/dev/zero", "", "a\0b", 3, ["{{ 1 }}"]]
)
def test_a_folder_names_no_file_as_its_template(tmp_path: Path, template: Any) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    fields = {"task": "causal-lm", "max_length": 7, "labels": [], "chat_template": template}
    (tmp_path / TASK_FILE).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=rf"{TASK_FILE}' cannot be read: chat_template.*It can be deleted"):
        adapter_task(tmp_path)
    for right in (None, "chatml", "{{ 1 }}"):
        (tmp_path / TASK_FILE).write_text(json.dumps({**fields, "chat_template": right}))
        assert adapter_task(tmp_path).chat_template == right


@pytest.mark.parametrize("command", ["generate", "eval", "train", "chat"])
def test_an_adapter_whose_template_never_ends(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Whether the folder has it in its task or with a tokenizer."""
    monkeypatch.setattr(template_process, "SECONDS", 0.5)
    from transformers import AutoModelForCausalLM

    bomb = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    model = peftcore.apply(AutoModelForCausalLM.from_pretrained(llama), "lora", target_modules=["q_proj"], r=2)
    peftcore.save(model, tmp_path / "a")
    in_task = command in ("generate", "train")
    task = AdapterTask("causal-lm", 64, chat=True, chat_template=bomb if in_task else None)
    task.write(tmp_path / "a")
    if not in_task:
        save_tokenizer(tmp_path / "a")
        (tmp_path / "a" / "chat_template.jinja").write_text(bomb)
    data = write_jsonl(tmp_path / "d.jsonl", 4 * [{"messages": [*TALK[:2], {"role": "assistant", "content": "good"}]}])
    words = {
        "generate": ("generate", "-a", tmp_path / "a", "-p", "the", "--device", "cpu"),
        "eval": ("eval", "-a", tmp_path / "a", "-d", data, "--device", "cpu"),
        "train": ("train", "-a", tmp_path / "a", "-d", data, "-o", tmp_path / "run", "--device", "cpu"),
        "chat": ("chat", "-a", tmp_path / "a", "--device", "cpu"),
    }[command]
    assert "the chat template took more than 0.5 s for one conversation" in run(*words, code=1).stderr
