"""What an adapter folder says of its task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftcore import CheckpointError
from peftcore.cli.models import TASK_FILE, AdapterTask, adapter_task


def test_a_task_file_that_names_no_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    fields = {"task": "classification", "max_length": 7, "labels": ["a", "b"]}
    (tmp_path / TASK_FILE).write_text(json.dumps(fields))
    assert adapter_task(tmp_path) == AdapterTask("classification", 7, ("a", "b"), chat=False)
    (tmp_path / TASK_FILE).write_text(json.dumps({**fields, "task": "chat"}))
    with pytest.raises(
        CheckpointError, match=r"task='chat' is none of causal-lm, classification, .*\. It may be deleted"
    ):
        adapter_task(tmp_path)
