"""docs/serving.md: its commands and its code run, in their order."""

from __future__ import annotations

import json
import re
import shlex
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from peftcore_serve import command
from peftcore_serve.app import Server
from support.command_fixtures import quick_pictures
from support.commands import invoke

__all__ = ["quick_pictures"]
PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a tiny one stands in for it


@pytest.mark.nightly  # two trainings
def test_the_guide(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    (tmp_path / MODEL).parent.mkdir()
    (tmp_path / MODEL).symlink_to(llama)
    turns = [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "It is very good."}]
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 6)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|sh)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (commands,) = (code for language, code in blocks if language == "sh")
    (code,) = (code for language, code in blocks if language == "python")

    def serve_the_code(server: Server, listening: socket.socket) -> None:
        runs = uvicorn.Server(command.uvicorn_config(server))
        thread = threading.Thread(target=runs.run, args=([listening],))
        thread.start()
        names: dict[str, Any] = {}
        try:
            exec(code.replace(":8000", f":{listening.getsockname()[1]}"), names)
        finally:
            names["client"].close()
            runs.should_exit = True
            thread.join()

    monkeypatch.setattr(command, "run", serve_the_code)
    for line in commands.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "peftcore":
            more = {"serve": ["--port", "0"], "train": ["--steps", "2"]}[words[1]]
            result = invoke(*words[1:], "--chat-template", "chatml", *more)
            assert result.exit_code == 0, result.output
