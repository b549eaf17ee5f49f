"""Modules that were replaced, resized or parametrized after `apply`: every function says which, `remove` gets out."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize

import peftcore
from peftcore.engine import adapter_modules, set_trainable
from peftcore.model.base_modules import original_class
from peftcore.plugin import Train
from peftcore.testing import disturb

pytestmark = pytest.mark.usefixtures("toys")
Q = "model.layers.0.self_attn.q_proj"


def replace(model: nn.Module) -> None:
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 32, bias=False)


def replace_by_copy(model: nn.Module) -> None:
    model.model.layers[0].self_attn.q_proj = copy.deepcopy(model.model.layers[0].self_attn.q_proj)


def delete(model: nn.Module) -> None:
    model.model.layers = model.model.layers[:0]


def other_class(model: nn.Module) -> None:
    class Other(nn.Linear):
        pass

    model.get_submodule(Q).__class__ = Other


def old_weight_norm(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(model.get_submodule(Q))


def weight_norm(model: nn.Module) -> None:
    parametrizations.weight_norm(model.get_submodule(Q))


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model.get_submodule(Q), "weight", Doubled())


def wider(model: nn.Module) -> None:
    model.get_submodule(Q).weight = nn.Parameter(torch.zeros(40, 32))


CHANGES: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "replaced": (replace, f"'{Q}' was replaced by another Linear"),
    "replaced by a copy": (replace_by_copy, f"'{Q}' was replaced by a Linear of another model, or a copy"),
    "deleted": (delete, f"'{Q}' is gone"),
    "another class": (other_class, f"'{Q}' was given another class, Other"),
    "weight_norm of old": (old_weight_norm, rf"'{Q}' has the parameters \['weight_g', 'weight_v'\] in place of"),
    "weight_norm": (weight_norm, rf"'{Q}' has the parameters \['parametrizations.weight'\] in place of \['weight'\]"),
    "parametrized": (parametrized, rf"'{Q}' has the parameters \['parametrizations.weight'\] in place of"),
    "resized": (wider, rf"'{Q}' has 'weight' of shape \[40, 32\], which was \[32, 32\]"),
}
USES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "apply": lambda m, _: peftcore.apply(m, "around", adapter="second"),
    "activate": lambda m, _: peftcore.activate(m, "default"),
    "save": lambda m, folder: peftcore.save(m, folder),
    "merge": lambda m, _: peftcore.merge(m, undo=True),
    "set_trainable": lambda m, _: set_trainable(m, "default", False),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("use", USES)
def test_the_module_and_what_became_of_it_are_named(kind: str, use: str, tmp_path: Path) -> None:
    change, told = CHANGES[kind]
    model = peftcore.apply(tiny.llama(), "around")
    change(model)
    with pytest.raises(peftcore.PeftcoreError, match=f"after the adapter 'default' was applied: {told}.*remove"):
        USES[use](model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("kind", CHANGES)
def test_summary_says_it_and_remove_gets_out(kind: str) -> None:
    change, told = CHANGES[kind]
    model = peftcore.apply(tiny.llama(), "around")
    change(model)
    summary = peftcore.summary(model)
    assert Q in summary.changed and "changed since: 'model.layers.0" in str(summary)
    with pytest.warns(UserWarning, match=f"remove did not restore modules that were changed after apply: {told}"):
        peftcore.remove(model)
    plain = tiny.llama()
    change(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    if kind not in ("resized", "replaced", "replaced by a copy"):  # which do not run, or have other values
        assert torch.equal(tiny.logits(model), tiny.logits(plain))
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds == [type(module).__name__ for module in plain.modules()]
    if kind != "replaced by a copy":  # it has the adapters that it was copied with
        assert not any("peftcore" in key for module in model.modules() for key in vars(module))
    if kind not in ("resized", "deleted", "replaced by a copy"):
        peftcore.apply(model, "around")
        assert torch.isfinite(tiny.logits(model)).all()


@pytest.mark.parametrize("child", (0, 1, 2))
def test_remove_finds_modules_that_moved(child: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    plain = copy.deepcopy(model)
    peftcore.apply(model, "lora", target_modules=["0", "2", "4"], init_lora_weights=False)
    del model[child], plain[child]  # renames those that follow
    with pytest.warns(UserWarning, match="'4' is gone"):
        peftcore.remove(model)
    row = torch.randn(3, 4)
    assert torch.equal(model(row), plain(row))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any("peftcore" in key for module in model.modules() for key in vars(module))


def resize_unnoticed(model: nn.Module) -> None:
    """As `model.resize_token_embeddings` was before it was refused."""
    original_class(model).resize_token_embeddings(model, 100, mean_resizing=False)


OF_VOCABULARY: dict[str, tuple[str, dict[str, Any], str]] = {
    "head": ("lora", {"target_modules": ["lm_head"]}, "lm_head"),
    "embedding": ("lora", {"target_modules": ["embed_tokens"]}, "model.embed_tokens"),
    "trained head": ("train", {"names": ("lm_head.weight",)}, "lm_head"),
    "rows": ("trainable-tokens", {"token_indices": [3, 5]}, "model.embed_tokens"),
}


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("case", list(OF_VOCABULARY))
def test_resizing_what_an_adapter_changes_is_refused(case: str, active: bool) -> None:
    method, fields, path = OF_VOCABULARY[case]
    model = peftcore.apply(tiny.llama(), method, **fields)
    disturb(model, "default", seed=1)
    before = tiny.logits(model)
    if not active:
        peftcore.activate(model, [])
    for arguments in ({"new_num_tokens": 100}, {"pad_to_multiple_of": 64}):
        with pytest.raises(peftcore.PeftcoreError, match=rf"'{path}'.*'default'.*remove\(model, 'default'\)"):
            model.resize_token_embeddings(**arguments, mean_resizing=False)
    for arguments in ({}, {"new_num_tokens": 96}, {"pad_to_multiple_of": 32}):
        assert model.resize_token_embeddings(**arguments) is model.model.embed_tokens
    peftcore.activate(model, "default")
    assert torch.equal(tiny.logits(model), before)
    peftcore.remove(model)
    model.resize_token_embeddings(100, mean_resizing=False)
    torch.testing.assert_close(tiny.logits(model)[..., :96], tiny.logits(tiny.llama()))


def test_a_vocabulary_that_no_adapter_changes_is_resized() -> None:
    model = peftcore.apply(tiny.llama(), "lora", target_modules=["q_proj"])
    disturb(model, "default", seed=1)
    before = tiny.logits(model)
    model.resize_token_embeddings(100, mean_resizing=False)
    torch.testing.assert_close(tiny.logits(model)[..., :96], before)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("active", [False, True])
def test_a_resized_vocabulary(tied: bool, active: bool) -> None:
    model = tiny.gpt2() if tied else tiny.llama()
    peftcore.apply(model, "train", names=("lm_head.weight",))
    if not active:
        peftcore.activate(model, [])
    resize_unnoticed(model)
    slot = "transformer.wte.weight" if tied else "lm_head.weight"
    shapes = rf"'{slot}' has shape \[100, 32\], which was \[96, 32\]"
    with pytest.raises(peftcore.PeftcoreError, match=shapes):
        peftcore.activate(model, "default")
    assert peftcore.summary(model).changed[slot] == "has shape [100, 32], which was [96, 32]"
    with pytest.warns(UserWarning, match="remove did not restore modules"):
        peftcore.remove(model)
    assert model.lm_head.weight.shape == (100, 32)
    assert tiny.logits(model).shape[-1] == 100


def test_an_adapter_of_a_resized_embedding() -> None:
    model = peftcore.apply(tiny.llama(), "lora", target_modules=["embed_tokens", "lm_head"])
    resize_unnoticed(model)
    changed = peftcore.summary(model).changed
    assert set(changed) == {"model.embed_tokens", "lm_head"}
    with pytest.raises(peftcore.PeftcoreError, match=r"'model.embed_tokens' .*'lm_head' was replaced"):
        peftcore.merge(model, undo=True)


def test_a_replaced_head_that_is_trained() -> None:
    model = peftcore.apply(tiny.bert_classifier(), "train", names=("classifier.weight", "classifier.bias"))
    model.classifier = nn.Linear(32, 3)
    with pytest.raises(peftcore.PeftcoreError, match="'classifier' was replaced by another Linear"):
        peftcore.activate(model, "default")


def test_a_module_that_has_lost_its_adapter_may_be_replaced(tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "around")
    peftcore.apply(model, "around", adapter="other", target_modules=("v_proj",))
    peftcore.remove(model, "default")
    replace(model)
    model.get_submodule(Q).requires_grad_(False)
    peftcore.activate(model, "other")
    peftcore.save(model, tmp_path)
    assert set(peftcore.engine.state_of(model).sites) == {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}
    peftcore.remove(model, "other")


def test_what_was_there_before_apply_is_no_change() -> None:
    model = tiny.llama()
    weight_norm(model)
    base = tiny.logits(model)
    peftcore.apply(model, "around")
    peftcore.activate(model, "default")
    assert not peftcore.summary(model).changed
    peftcore.remove(model)
    assert torch.equal(tiny.logits(model), base)


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: m.to_empty(device="meta"), copy.deepcopy])
def test_moving_casting_and_copying_are_no_change(change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(peftcore.apply(tiny.llama(), "around"))
    assert not peftcore.summary(model).changed
    peftcore.activate(model, "default")


def test_a_layer_inside_a_wrapper_is_found() -> None:
    """PyTorch's for activation checkpointing is on the way to it, and no part of its path."""
    model = nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.Linear(4, 4))))
    peftcore.apply(model, "lora", r=1, target_modules=["0.0"])
    assert [path for path, _ in adapter_modules(model, "default")] == ["0.0"]
    peftcore.apply(model, "lora", r=1, target_modules=["0.0"], adapter="second")
    peftcore.remove(model, "second")
    peftcore.remove(model)
    assert "peftcore" not in model[0][0]._modules


class Blocks(nn.ModuleList):
    """A list that is called, as the experts of SwitchTransformers are."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x + self.bias


def test_a_list_with_a_parameter_and_a_forward_of_its_own_is_unchanged() -> None:
    model = nn.Sequential(Blocks(), nn.Linear(4, 4))
    with tiny.installed(tiny.method("bias", lambda *_: [Train(("0.bias",))])):
        peftcore.apply(model, "bias")
        assert peftcore.summary(model).changed == {}
        peftcore.remove(model)
    assert type(model[0]) is Blocks and not any("peftcore" in key for each in model.modules() for key in vars(each))
