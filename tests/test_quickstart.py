"""The quick start on its own model and examples, up to llama.cpp's answer; `test_docs.py` runs it on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peftcore_cli.data import row_reading

ROOT = Path(__file__).parent.parent
LLAMA = Path(os.environ.get("PEFTCORE_LLAMA", ROOT / ".llama/bin/python"))


def test_its_examples_are_conversations_with_one_answer_to_each_question() -> None:
    rows = row_reading.read_rows(ROOT / "examples/chat.jsonl", "causal-lm")
    asked = [row.messages[0]["content"] for row in rows]
    assert len(set(asked)) == len(rows)
    assert {tuple(turn["role"] for turn in row.messages) for row in rows} == {("user", "assistant")}
    line = (ROOT / "docs/quickstart.md").read_text().partition("```json\n")[2].partition("\n```")[0]
    assert json.loads(line)["messages"] == rows[0].messages, "the page shows the first of them"


@pytest.mark.skipif(
    not LLAMA.exists(), reason=f"llama.cpp is not built ({LLAMA}): make export-check does, in five minutes"
)
@pytest.mark.skipif(not (ROOT / ".demo/fetched").exists(), reason="SmolLM2 is not fetched (.demo): make demo does")
def test_llama_cpp_answers_as_the_chat_file_does(tmp_path: Path) -> None:
    script = [sys.executable, ROOT / "benchmarks/export/quickstart.py", "--llama", LLAMA, tmp_path / "new"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "both answer as they were taught: We open at 7:40 every day but Tuesday." in done.stdout
