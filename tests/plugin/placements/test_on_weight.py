"""`OnWeight`: what a module's forward reads of a parameter, on layers of every kind; and merged."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support import tiny
from support.releases import TORCH_2_9
from torch import Tensor, nn

import peftcore
from peftcore.engine.adaptation.adapted import adapters_at
from peftcore.plugin import OnWeight
from peftcore.testing import disturb

pytestmark = pytest.mark.usefixtures("toys")
X = torch.linspace(-1, 1, 5 * 16).sin().view(5, 16)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[None], x[None], x[None])[0]


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


def gpt2_layer() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(8, 16))


TOKENS = torch.arange(6)[None]
EXPERTS = "model.layers.1.mlp.experts"
CASES: dict[str, tuple[Any, tuple[str, ...], Tensor]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), ("0:weight", "1:weight"), X),
    "conv1d of transformers": (gpt2_layer, ("0:weight",), X),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, groups=1)),
        ("0:weight",),
        X.view(1, 1, 8, 10).expand(1, 3, -1, -1),
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(10, 8)), ("0:weight",), TOKENS),
    "attention": (Attention, ("inner:in_proj_weight", "inner:out_proj.weight"), X),
    "experts": (mixtral, (f"{EXPERTS}:gate_up_proj", f"{EXPERTS}:down_proj"), TOKENS),
}


@pytest.fixture(params=CASES)
def case(request: Any) -> tuple[nn.Module, tuple[str, ...], Tensor]:
    make, names, x = CASES[request.param]
    torch.manual_seed(0)
    return make().eval(), names, x


def output(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    return found if isinstance(found, Tensor) else found.logits


def changed_by_hand(model: nn.Module, names: tuple[str, ...], adapter: str = "default") -> dict[str, Tensor]:
    """The parameters as the adapters make them, by full name."""
    found = {}
    for name in names:
        path, _, parameter = name.partition(":")
        module = model.get_submodule(path)
        change = adapters_at(module)[adapter].changes[parameter]
        found[f"{path}.{parameter}"] = change(module.get_parameter(parameter))
    return found


def test_the_forward_reads_the_changed_parameter(case: Any) -> None:
    model, names, x = case
    keys, base = list(model.state_dict()), output(model, x)
    plain = copy.deepcopy(model)
    peftcore.apply(model, "on-weight", names=names)
    assert torch.equal(output(model, x), base)
    disturb(model, "default", seed=1)
    wanted = torch.func.functional_call(plain, changed_by_hand(model, names), x)
    wanted = wanted if isinstance(wanted, Tensor) else wanted.logits
    assert torch.equal(output(model, x), wanted) and not torch.equal(wanted, base)
    assert [key for key in model.state_dict() if ".peftcore." not in key] == keys
    output(model, x).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(names) and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    with peftcore.disabled(model):
        assert torch.equal(output(model, x), base)
    assert torch.equal(output(copy.deepcopy(model), x), output(model, x))
    changes = adapters_at(model.get_submodule(names[0].partition(":")[0]))["default"]
    assert list(pickle.loads(pickle.dumps(changes)).changes) == list(changes.changes)
    peftcore.remove(model)
    assert torch.equal(output(model, x), base)


def test_it_merges_and_is_unmerged_bit_for_bit(case: Any) -> None:
    model, names, x = case
    before = {name: value.clone() for name, value in model.state_dict().items()}
    peftcore.apply(model, "on-weight", names=names)
    disturb(model, "default", seed=1)
    acting, changed = output(model, x), changed_by_hand(model, names)
    peftcore.merge(model, undo=True)
    torch.testing.assert_close(output(model, x), acting, rtol=0, atol=1e-5)
    for name, value in changed.items():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=0, atol=1e-6)
    peftcore.unmerge(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    peftcore.merge(model)
    assert list(model.state_dict()) == list(before)
    torch.testing.assert_close(output(model, x), acting, rtol=0, atol=1e-5)


def test_it_is_saved_by_the_parameters_name(case: Any, tmp_path: Any) -> None:
    model, names, x = case
    again = copy.deepcopy(model)
    peftcore.apply(model, "on-weight", names=names)
    disturb(model, "default", seed=1)
    peftcore.save(model, tmp_path)
    peftcore.load(again, tmp_path)
    assert torch.equal(output(again, x), output(model, x))


# PyTorch 2.9 reads `grad` of an output where it goes on after the break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_it_compiles_and_is_checkpointed() -> None:
    make, names, x = CASES["linear"]
    model = peftcore.apply(make(), "on-weight", names=names)
    disturb(model, "default", seed=1)
    wanted = model(x)
    # PyTorch 2.9 breaks the graph where the layer is copied.
    torch.testing.assert_close(torch.compile(model, fullgraph=not TORCH_2_9, backend="aot_eager")(x), wanted)
    wanted.sum().backward()
    gradient = model[0].peftcore["default"].changes["weight"].b.grad.clone()
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    assert torch.equal(model[0].peftcore["default"].changes["weight"].b.grad, gradient)


def test_it_is_called_once_a_call() -> None:
    """However often the forward reads the parameter: experts read it for each expert."""
    model = mixtral()
    model.set_experts_implementation("eager")
    peftcore.apply(model, "on-weight", names=CASES["experts"][1])
    calls: list[str] = []
    for name, change in adapters_at(model.get_submodule(EXPERTS))["default"].changes.items():
        change.register_forward_hook(lambda *_, name=name: calls.append(name))
    output(model, TOKENS)
    assert sorted(calls) == ["down_proj", "gate_up_proj"]


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_packed_weight_is_read_dense(double_quant: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    peftcore.quantize(model, double_quant=double_quant, skip=["1"])
    dense = nn.Sequential(nn.Linear(64, 32), copy.deepcopy(model[1]))
    dense[0].load_state_dict({"weight": model[0].dequantized(torch.float32), "bias": model[0].bias})
    x = torch.randn(3, 64)
    peftcore.apply(model, "on-weight", names=("0:weight",))
    disturb(model, "default", seed=1)
    change = adapters_at(model[0])["default"].changes["weight"]
    with torch.no_grad():
        dense[0].weight.copy_(change(dense[0].weight))
    torch.testing.assert_close(model(x), dense(x))
    peftcore.merge(model, dtype=torch.float32, undo=True)
    torch.testing.assert_close(model(x), dense(x))


def test_two_of_them_and_one_around_act_in_their_order() -> None:
    """Changes of what the forward reads lie inside; `base.weight()` knows all of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    weight, x = model[0].weight.detach().clone(), X
    peftcore.apply(model, "on-weight", names=("0:weight",), adapter="a")
    peftcore.apply(model, "around", target_modules=("0",), value=3.0, adapter="b")
    peftcore.apply(model, "on-weight", names=("0:weight",), adapter="c")
    for seed, name in enumerate("ac"):
        disturb(model, name, seed)
    a, c = (adapters_at(model[0])[name].changes["weight"] for name in "ac")
    wanted = 3 * nn.functional.linear(x, c(a(weight)), model[0].bias)
    torch.testing.assert_close(model(x), wanted)
    peftcore.merge(model, undo=True)
    torch.testing.assert_close(model(x), wanted)


class Remembers(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


def test_what_a_forward_notes_on_its_module_is_there() -> None:
    model = nn.Sequential(Remembers(16, 4))
    peftcore.apply(model, "on-weight", names=("0:weight",))
    y = model(X)
    assert model[0].last is y
    peftcore.remove(model)
    assert model[0].last is y and type(model[0]) is Remembers


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("0:wieght",),
            "changes the parameter 'wieght' of '0', but this module has no such parameter .nearest: 'weight'",
        ),
        (("0:weight", "0:weight"), "places two adapters on the same parameter of '0'"),
    ],
)
def test_what_cannot_be_is_refused(names: tuple[str, ...], message: str) -> None:
    place = lambda *_: [OnWeight(*each.split(":"), tiny.LowRank(4, 16)) for each in names]  # noqa: E731
    with (
        tiny.installed(tiny.method("wrong", place)),
        pytest.raises(peftcore.PeftcoreError, match=message),
    ):
        peftcore.apply(nn.Sequential(nn.Linear(16, 4)), "wrong")


def test_codes_are_no_numbers() -> None:
    place = lambda *_: [OnWeight("0", "codes", nn.Identity())]  # noqa: E731
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].codes = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with (
        tiny.installed(tiny.method("wrong", place)),
        pytest.raises(
            peftcore.PeftcoreError, match=r"'codes' of '0', but no weight format can read its dtype torch.uint8"
        ),
    ):
        peftcore.apply(model, "wrong")


def test_a_child_with_adapters_of_its_own_is_refused() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 4)))
    peftcore.apply(model, "around", target_modules=("0.0",), adapter="inner")
    place = lambda *_: [OnWeight("0", "0.weight", tiny.LowRank(4, 16))]  # noqa: E731
    with tiny.installed(tiny.method("outer", place)):
        peftcore.apply(model, "outer")
        with pytest.raises(peftcore.PeftcoreError, match="its submodule '0' has adapters too"):
            model(X)
