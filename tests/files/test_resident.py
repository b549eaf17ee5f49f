"""Adapters kept on disk: they are read when they are named, and the least recently used are dropped unchanged."""

import copy
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

import peftcore
from peftcore.adaptation.base_modules import original_class
from peftcore.engine import adapter_parameters, require_state, set_trainable
from peftcore.files.resident import OnDisk
from peftcore.testing import disturb

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
SIZE = 2 * 2 * (4 + 4) * 4  # bytes: two layers, r=2, fp32


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of adapters a, b, c and d."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("abcd"):
        model = peftcore.apply(base(), "lora", r=2)
        disturb(model, "default", seed=seed, std=0.5)
        peftcore.save(model, folder / name)
    return {name: folder / name for name in "abcd"}


@pytest.fixture
def folders(saved: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The same, to be changed."""
    return {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in saved.items()}


def on_disk(folders: dict[str, Path], limit: int | None = None) -> nn.Module:
    model = base()
    for name, path in folders.items():
        peftcore.load(model, path, adapter=name, resident=False)
    peftcore.set_resident_limit(model, limit)
    return model


def here(model: nn.Module) -> list[str]:
    return list(require_state(model).applied)


def with_each(folders: dict[str, Path]) -> dict[str, Tensor]:
    found = {}
    for name, path in folders.items():
        found[name] = peftcore.load(base(), path)(X).detach()
    return found


def test_nothing_stays_in_memory_until_it_is_named(saved: dict[str, Path]) -> None:
    model, wanted = on_disk(saved), with_each(saved)
    assert here(model) == [] and not any(p.requires_grad for p in model.parameters())
    assert [original_class(module) for module in model] == [nn.Linear, nn.Linear]
    assert torch.equal(model(X), base()(X))
    for name in "abca":
        peftcore.activate(model, name)
        assert torch.equal(model(X), wanted[name])
    assert here(model) == ["a", "b", "c"]  # without a limit those that came stay
    assert not any(p.requires_grad for p in model.parameters())


def test_the_least_recently_used_goes_first_and_one_that_acts_never(saved: dict[str, Path]) -> None:
    model, wanted = on_disk(saved, 2 * SIZE), with_each(saved)
    for name, left in (("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc"), ("d", "bd")):
        peftcore.activate(model, name)
        assert sorted(here(model)) == list(left)
        assert torch.equal(model(X), wanted[name])
    peftcore.activate(model, ["b", "d"])
    with pytest.raises(peftcore.PeftcoreError, match=r"2 adapters .* \(b, d\) and take 256 bytes, but the limit is 1"):
        peftcore.set_resident_limit(model, SIZE)
    peftcore.activate(model, "d")
    peftcore.set_resident_limit(model, SIZE)
    assert here(model) == ["d"]
    peftcore.set_resident_limit(model, None)
    peftcore.activate(model, [])
    peftcore.activate(model, ["b"])
    assert sorted(here(model)) == ["b", "d"]


def test_samples_of_a_batch_call_theirs(saved: dict[str, Path]) -> None:
    model, wanted = on_disk(saved, 2 * SIZE), with_each(saved)
    for names in (["a", None, "b"], ["c", "c", "b"], ["a", "d", None], ["d", "a", "d"]):
        peftcore.activate(model, names, per_sample=True)
        rows = [(base()(X) if name is None else wanted[name])[i] for i, name in enumerate(names)]
        torch.testing.assert_close(model(X), torch.stack(rows))
        assert len(here(model)) <= 2
    with pytest.raises(peftcore.PeftcoreError, match=r"3 adapters on disk are needed at the same time"):
        peftcore.activate(model, ["a", "b", "c"], per_sample=True)
    rows = [wanted["d"][0], wanted["a"][1], wanted["d"][2]]
    torch.testing.assert_close(model(X), torch.stack(rows))  # which still act
    peftcore.load(model, saved["a"], adapter="new", resident=False)  # while each sample has its own
    peftcore.activate(model, ["new", None, None], per_sample=True)
    torch.testing.assert_close(model(X)[0], wanted["a"][0])


@pytest.mark.parametrize("harm", ["gone", "other", "cut", "folder"])
def test_a_file_that_is_not_what_it_was_is_named(folders: dict[str, Path], harm: str) -> None:
    model = on_disk(folders, 2 * SIZE)
    peftcore.activate(model, ["a", "b"])
    before, file = model(X), folders["c"] / "adapter_model.safetensors"
    if harm == "gone":
        file.unlink()
    elif harm == "folder":
        shutil.rmtree(folders["c"])
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        shutil.copytree(folders["d"], folders["c"], dirs_exist_ok=True)
    what = "has changed since it was loaded" if harm == "other" else "cannot be read"
    with pytest.raises(peftcore.CheckpointError, match=f"the adapter 'c' is on disk,? and .*{what}"):
        peftcore.activate(model, "c")
    assert torch.equal(model(X), before) and sorted(here(model)) == ["a", "b"]
    peftcore.remove(model, "c")
    peftcore.activate(model, "d")


@pytest.mark.parametrize("how", ["in place", "data", "gradients", "trainable", "set_state_dict"])
def test_one_that_was_changed_stays(folders: dict[str, Path], how: str) -> None:
    model = on_disk(folders, SIZE)
    peftcore.activate(model, "a")
    parameter = next(p for _, p in adapter_parameters(model, "a"))
    if how == "in place":
        parameter.add_(1)
    elif how == "data":
        parameter.data.neg_()
    elif how == "gradients":
        parameter.requires_grad_()
    elif how == "trainable":
        set_trainable(model, "a", True)
    else:
        peftcore.set_state_dict(model, "a", folders["b"])
    changed = model(X).detach()
    with pytest.warns(
        UserWarning, match="the adapter 'a' was changed after it was read from .*, so it stays in memory"
    ):
        peftcore.activate(model, "c")
    assert sorted(here(model)) == ["a", "c"]
    peftcore.activate(model, "d")  # it is counted no more
    assert sorted(here(model)) == ["a", "d"]
    peftcore.activate(model, "a")
    assert torch.equal(model(X), changed)


def test_a_factor_is_kept_when_an_adapter_is_dropped_and_read_again(saved: dict[str, Path]) -> None:
    model = on_disk(saved, SIZE)
    peftcore.scale(model, "a", 0.5)
    peftcore.activate(model, "a")
    half = model(X)
    peftcore.activate(model, "b")
    peftcore.activate(model, "a")
    assert torch.equal(model(X), half) and not torch.equal(half, with_each(saved)["a"])


def test_what_else_names_an_adapter_calls_it(saved: dict[str, Path], tmp_path: Path) -> None:
    model, wanted = on_disk(saved), with_each(saved)
    with pytest.raises(peftcore.PeftcoreError, match="4 adapters are on disk, such as 'a', and would be left out"):
        peftcore.save(model, tmp_path / "all")
    peftcore.save(model, tmp_path / "one", adapter="a")
    assert torch.equal(peftcore.load(base(), tmp_path / "one")(X), wanted["a"])
    assert list(peftcore.state_dict(model, "b")) == list(peftcore.state_dict(model, "a"))
    peftcore.combine(model, ["c", "d"], adapter="sum")
    peftcore.activate(model, "sum")
    torch.testing.assert_close(model(X), _sum_of(saved))
    assert sorted(here(model)) == ["a", "b", "c", "d", "sum"]
    peftcore.merge(model)
    with pytest.raises(peftcore.PeftcoreError, match="adapters are merged"):
        peftcore.activate(model, "a")
    peftcore.unmerge(model)


def _sum_of(saved: dict[str, Path]) -> Tensor:
    model = base()
    for name in "cd":
        peftcore.load(model, saved[name], adapter=name)
    peftcore.combine(model, ["c", "d"], adapter="sum")
    peftcore.activate(model, "sum")
    return model(X)


def test_removing_the_last_gives_the_base_back(saved: dict[str, Path]) -> None:
    model, keys = base(), list(base().state_dict())
    for name in "ab":
        peftcore.load(model, saved[name], adapter=name, resident=False)
    peftcore.activate(model, "a")
    peftcore.remove(model, "a")
    assert not any(p.requires_grad for p in model.parameters())
    peftcore.activate(model, "b")
    peftcore.activate(model, [])
    peftcore.remove(model, "b")
    assert all(p.requires_grad for p in model.parameters()) and type(model) is nn.Sequential
    assert list(model.state_dict()) == keys
    with pytest.raises(peftcore.PeftcoreError, match="no adapter is applied to this model"):
        peftcore.remove(model, "b")


def test_names_and_what_cannot_rest(saved: dict[str, Path], tmp_path: Path) -> None:
    model = on_disk(saved)
    for call in (
        lambda: peftcore.load(model, saved["a"], adapter="a", resident=False),
        lambda: peftcore.load(model, saved["a"], adapter="a"),
        lambda: peftcore.apply(model, "lora", r=2, adapter="a"),
    ):
        with pytest.raises(peftcore.PeftcoreError, match="an adapter 'a' is registered on disk already"):
            call()
    with pytest.raises(peftcore.PeftcoreError, match=r"no adapter 'e' is applied"):
        peftcore.activate(model, ["a", "e"])
    assert here(model) == []
    with pytest.raises(peftcore.PeftcoreError, match=r"resident=False\) is for adapters that do not train"):
        peftcore.load(model, saved["a"], adapter="e", resident=False, trainable=True)
    with pytest.raises(peftcore.PeftcoreError, match="a number of bytes or None, found '1 GB'"):
        peftcore.set_resident_limit(model, "1 GB")  # type: ignore[arg-type]
    whole = peftcore.apply(base(), "lora", r=2, target_modules=["0"], modules_to_save=["1"])
    peftcore.save(whole, tmp_path / "whole")
    with pytest.raises(peftcore.PeftcoreError, match=r"cannot be loaded with resident=False: it trains '1.weight'"):
        peftcore.load(model, tmp_path / "whole", adapter="whole", resident=False)
    other = peftcore.apply(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4)), "lora", r=2)
    peftcore.save(other, tmp_path / "other")
    with pytest.raises(peftcore.CheckpointError, match="another base"):
        peftcore.load(model, tmp_path / "other", adapter="other", resident=False)
    assert list(require_state(model).on_disk) == list("abcd")


def test_a_copy_calls_its_own(saved: dict[str, Path]) -> None:
    model, wanted = on_disk(saved, SIZE), with_each(saved)
    peftcore.activate(model, "a")
    copied = copy.deepcopy(model)
    peftcore.activate(copied, "b")
    assert torch.equal(copied(X), wanted["b"]) and torch.equal(model(X), wanted["a"])
    assert here(model) == ["a"] and here(copied) == ["b"]
    record = require_state(copied).on_disk["b"]
    assert isinstance(record, OnDisk) and record.size == SIZE


def test_prompts_may_rest_too(tmp_path: Path) -> None:
    model, tokens = tiny.llama().eval(), torch.tensor([[5, 6, 7]])
    trained = peftcore.apply(copy.deepcopy(model), "prompt-tuning", num_virtual_tokens=2)
    disturb(trained, "default", seed=1, std=0.5)
    peftcore.save(trained, tmp_path)
    peftcore.load(model, tmp_path, adapter="prompt", resident=False)
    before = model(input_ids=tokens).logits
    peftcore.activate(model, "prompt")
    assert torch.equal(model(input_ids=tokens).logits, trained(input_ids=tokens).logits)
    peftcore.activate(model, [])
    assert torch.equal(model(input_ids=tokens).logits, before)
