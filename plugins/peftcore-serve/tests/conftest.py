"""A tiny base, a folder of adapters, and a server of both."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases import base_and_adapter, models
from peftcore_cli.tasks import text_generation
from peftcore_serve.app import Server
from peftcore_serve.command import make
from starlette.testclient import TestClient
from support.command_fixtures import llama

import peftcore

__all__ = ["llama"]
TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}is {% endif %}"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "one": ("lora", {"r": 4}),
    "two": ("lora", {"r": 4}),
    "wide": ("lora", {"r": 8, "target_modules": "all-linear"}),
    "scaled": ("ia3", {}),
    "prefix": ("prefix-tuning", {"num_virtual_tokens": 3}),
}
PROMPTS = ("the film is good", "the film", "story with no heart and a very dull", "a", "it was not")


@functools.cache
def _to_save_from(base: Path) -> Any:
    return models.load_model(str(base), "causal-lm")


def save_adapter(base: Path, folder: Path, method: str, seed: int, **fields: Any) -> None:
    """Save an adapter of random values."""
    model = _to_save_from(base)
    torch.manual_seed(seed)
    peftcore.apply(model, method, **fields)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    peftcore.save(model, folder)
    peftcore.remove(model)


@functools.cache
def with_adapter(base: Path, adapter: Path | None) -> Any:
    model = models.load_model(str(base), "causal-lm")
    return model if adapter is None else base_and_adapter.load_adapter(model, adapter)


def written(base: Path, adapter: Path | None, prompt: str, tokens: int = 8) -> str:
    """What `peftcore generate` writes, without a server."""
    model = with_adapter(base, adapter)
    return text_generation.generate_text(model, models.load_tokenizer(str(base)), prompt, max_new_tokens=tokens)


@pytest.fixture(scope="session")
def saved(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters: one of a run, and one that is broken."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, (method, fields)) in enumerate(METHODS.items()):
        save_adapter(llama, root / name / ("adapter" if name == "two" else ""), method, seed, **fields)
    shutil.copytree(root / "one", root / "broken")
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"none")
    shutil.copytree(root / "one", root / "classifier")
    task = {"task": "classification", "max_length": 8, "labels": ["up", "down"]}
    (root / "classifier" / "peftcore_task.json").write_text(json.dumps(task))
    (root / "notes").mkdir()
    return root


@pytest.fixture(scope="session")
def shared(llama: Path, saved: Path) -> Iterator[tuple[Server, TestClient]]:
    """A server for tests that change nothing, and its client."""
    server = make(str(llama), saved, chat_template=TEMPLATE, limit=8)
    with TestClient(server.app) as client:
        yield server, client


@pytest.fixture
def client(shared: tuple[Server, TestClient]) -> TestClient:
    return shared[1]
