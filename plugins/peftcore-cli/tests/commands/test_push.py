"""`peftcore push` against a local server that speaks the part of the hub's protocol that it uses."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.commands import printed

import peftcore


class Hub(ThreadingHTTPServer):
    """Repositories by name: whether they are private, and the files of their last commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: dict[str, bool] = {"org/taken": True}
        self.files: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.refuses: dict[str, int] = {}  # part of a path: status


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def respond(self) -> None:
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status = next((status for part, status in hub.refuses.items() if part in self.path), None)
        if status is not None or self.headers.get("Authorization") != "Bearer secret":
            return self.answer(status or 401, {"error": "refused"})
        if self.path == "/api/whoami-v2":
            return self.answer(200, {"name": "org", "type": "user"})
        if self.path == "/api/validate-yaml":  # the header of the model card
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'org'}/{asked['name']}"
            url = f"http://127.0.0.1:{hub.server_port}/{name}"
            if name in hub.private:
                return self.answer(409, {"error": "You already created this model repo", "url": url})
            hub.private[name] = asked.get("private", asked.get("visibility") == "private")
            return self.answer(200, {"url": url})
        name = "/".join(self.path.split("?")[0].split("/")[3:5])
        if name not in hub.private:
            return self.answer(404, {"error": "Repository not found"})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            hub.messages.append(lines[0]["value"]["summary"])
            contents = {each["value"]["path"]: base64.b64decode(each["value"]["content"]) for each in lines[1:]}
            hub.files[name] = contents
            url = f"http://127.0.0.1:{hub.server_port}/{name}/commit/{'0' * 40}"
            return self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})
        return self.answer(200, {"id": name, "modelId": name, "private": hub.private[name], "siblings": [], "tags": []})

    do_GET = do_POST = do_HEAD = respond


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    constants = pytest.importorskip("huggingface_hub.constants")
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = peftcore.save(peftcore.apply(tiny.llama(), "lora", r=2), tmp_path / "adapter")
    (folder / "tokenizer.json").write_text("{}")
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "complete.json"):
        (folder / name).write_text("of this machine")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "adapter_config.json").write_text("{}")
    return folder


def refused(match: str, *arguments: Any) -> None:
    status, output = printed(*arguments)
    assert status == 1 and re.search(match, " ".join(output.split())), output


FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}


def test_a_new_repository_is_private(hub: Hub, adapter: Path) -> None:
    status, output = printed("push", adapter, "org/mine")
    assert status == 0, output
    assert hub.private["org/mine"] and hub.files["org/mine"].keys() == FILES
    assert all(content == (adapter / name).read_bytes() for name, content in hub.files["org/mine"].items())
    assert "/org/mine (private)" in output and "peftcore.load(model, 'org/mine')" in output


def test_public_and_update(hub: Hub, adapter: Path) -> None:
    assert printed("push", adapter, "org/mine", "--public")[0] == 0
    assert hub.private["org/mine"] is False
    (adapter / "README.md").write_text("# Mine\n")
    assert printed("push", adapter, "org/mine", "--update", "--message", "Words")[0] == 0
    assert hub.files["org/mine"]["README.md"] == b"# Mine\n" and hub.messages[1] == "Words"
    refused("--public only works for new repositories", "push", adapter, "org/mine", "--update", "--public")


@pytest.mark.parametrize(
    ("arguments", "refuses", "match"),
    [
        (["org/taken"], {}, "the repository exists already. Choose another name, or pass --update"),
        (["org/none", "--update"], {}, "repository 'org/none' was not found on the hub. Remove --update"),
        (["org/mine"], {"whoami": 401}, "the hub rejects the token. Log in with `hf auth login`"),
        (["org/mine"], {"create": 403}, "the token has no write access to the repository. .*, or choose another ORG"),
        (
            ["org/mine"],
            {"commit": 507},  # the client does not try again
            "the hub answered 507.*'org/mine' was created and is empty: continue with --update",
        ),
        (["org/mine/more"], {}, "'org/mine/more' is not a valid repository name: .*Pass ORG/NAME"),
    ],
)
def test_what_the_hub_refuses(arguments: list[str], refuses: Any, match: str, hub: Hub, adapter: Path) -> None:
    hub.refuses = refuses
    refused(match, "push", adapter, *arguments)
    assert not hub.files


def test_without_a_token_or_a_network(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    (tmp_path / "empty").mkdir()
    refused("is missing", "push", tmp_path / "empty", "org/mine")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("the hub cannot be reached .* Check the network, HF_ENDPOINT", "push", adapter, "org/mine")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    refused("no token of the hub was found. Log in with `hf auth login`", "push", adapter, "org/mine")
