"""An id of Hugging Face's hub in place of a folder; the hub is a local folder, and its cache one of the test's."""

import builtins
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from support import tiny

import peftcore
from peftcore.engine import adapter_parameters

pytestmark = pytest.mark.usefixtures("toys")


class Hub:
    """Repositories as folders; `snapshot_download` of them lays links to blobs, as the hub's cache has them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.fetched = folder, [], set()

    def snapshot_download(self, name: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        self.asked.append((name, revision))
        repository = self.folder / name
        if not repository.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("404 Client Error.\n\nRepository Not Found for url")
        cache = self.folder / "cache" / name.replace("/", "--") / "snapshots" / "0123"
        files = [path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            self.fetched.add(file)
            blob = cache.parent.parent / "blobs" / file.replace("/", "-")
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / file, blob)
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            (cache / file).unlink(missing_ok=True)
            (cache / file).symlink_to(os.path.relpath(blob, (cache / file).parent))
        return str(cache)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return hub


def gains(model: torch.nn.Module, adapter: str = "default") -> set[float]:
    return {p.item() for _, p in adapter_parameters(model, adapter)}


def test_only_what_is_read_is_fetched(hub: Hub) -> None:
    folder = peftcore.save(peftcore.apply(tiny.llama(), "around", value=3.0), hub.folder / "org" / "name")
    for other in ("model.safetensors", "optimizer.pt", "checkpoint-10/adapter_model.safetensors", "README.md"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(b"x")
    assert gains(peftcore.load(tiny.llama(), "org/name", revision="v1")) == {3.0}
    assert hub.fetched == {"adapter_config.json", "adapter_model.safetensors"}
    assert hub.asked == [("org/name", "v1")]
    hub.fetched.clear()
    assert gains(peftcore.load(tiny.llama(), "org/name", adapter="mine"), "mine") == {3.0}
    assert "checkpoint-10/adapter_model.safetensors" not in hub.fetched


@pytest.mark.parametrize("first", ["default", "a"])
def test_several_that_were_saved_together(hub: Hub, first: str) -> None:
    model = peftcore.apply(tiny.llama(), "around", value=3.0, adapter=first)
    peftcore.save(peftcore.apply(model, "around", value=2.0, adapter="b"), hub.folder / "org" / "name")
    loaded = peftcore.load(tiny.llama(), "org/name")
    assert gains(loaded, first) == {3.0} and gains(loaded, "b") == {2.0}


def test_a_folder_here_comes_first(hub: Hub, tmp_path: Path) -> None:
    peftcore.save(peftcore.apply(tiny.llama(), "around", value=3.0), hub.folder / "org" / "name")
    peftcore.save(peftcore.apply(tiny.llama(), "around", value=5.0), tmp_path / "org" / "name")
    assert gains(peftcore.load(tiny.llama(), "org/name")) == {5.0}
    assert hub.asked == []
    with pytest.raises(peftcore.CheckpointError, match=r"revision='v1' only works with .*'org/name' is a local folder"):
        peftcore.load(tiny.llama(), "org/name", revision="v1")
    for path in (Path("org/other"), "./org/other", "org/other/more", "/org/other", "other", "../org"):
        with pytest.raises(peftcore.CheckpointError, match=r"the folder .* does not exist"):
            peftcore.load(tiny.llama(), path)
    with pytest.raises(peftcore.CheckpointError, match=r"revision='v1' .*'./org/other' is not a hub id \(ORG/NAME"):
        peftcore.load(tiny.llama(), "./org/other", revision="v1")
    assert hub.asked == []


def test_what_the_hub_does_not_give(hub: Hub) -> None:
    with pytest.raises(
        peftcore.CheckpointError,
        match=r"no adapter with this name \(revision 'v2'\) could be downloaded from the Hugging Face Hub: "
        r"LocalEntryNotFoundError: 404 Client Error. Repository Not Found for url. For a local",
    ):
        peftcore.load(tiny.llama(), "org/gone", revision="v2")


def test_without_the_library(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    model = tiny.llama()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(peftcore.CheckpointError, match="needs the library huggingface_hub, which is not installed"):
        peftcore.load(model, "org/name")


def test_offline_the_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library itself."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--org--name", "0" * 40
    peftcore.save(peftcore.apply(tiny.llama(), "around", value=3.0), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert gains(peftcore.load(tiny.llama(), "org/name")) == {3.0}
    with pytest.raises(
        peftcore.CheckpointError, match=r"this name could be .*: LocalEntryNotFoundError: .*Without a network"
    ):
        peftcore.load(tiny.llama(), "org/other")
