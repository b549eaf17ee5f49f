"""Methods at a linear layer that returns `[..., groups, out / groups]`: right, or refused by `apply`."""

import copy
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.plugin import disturb
from peftcore.plugin.registry import registry

GROUPS, WIDTH = 4, 8
RIGHT: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 10},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 4},
    "deft": {},
    "delora": {},
    "dora": {"lora_dropout": 0.1},  # has no effect where the weight is changed, as `apply` warns
    "fourierft": {"n_frequency": 10},
    "glora": {},
    "gralora": {"r": 4},
    "hira": {},
    "hra": {"r": 2},
    "ia3": {},
    "loha": {},
    "lokr": {},
    "lora": {},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 4},
    "peanut": {},
    "psoft": {"r": 4},
    "randlora": {},
    "road": {"group_size": 4},
    "shira": {"r": 2},
    "supertuning": {},
    "tinylora": {"r": 2},
    "unilora": {},
    "vblora": {"vector_length": 4, "num_vectors": 8, "topk": 2},
    "vera": {},
    "waveft": {"n_frequency": 10},
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "adapter": ("fails on its output", {}),
    "beft": ("adds a bias, which the layer does not have", {}),
    "lily": ("changes the output, not the weight", {}),
    "loha": ("draws random numbers in training", {"rank_dropout": 0.1}),
    "poly": ("depends on the inputs of the model's call", {}),
    "pvera": ("draws random numbers in training", {}),
    "reft": ("fails on its output", {}),
    "relora": ("", {}),
}
OF_OTHER_LAYERS = {"adaption-prompt", "alora", "bitfit", "ln-tuning", "qlora", "trainable-tokens"}


class Grouped(nn.Linear):
    """Product in groups, as DeepSeek-V4 has it: x `[..., groups, in]` -> `[..., groups, out / groups]`."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(GROUPS, -1, self.in_features).transpose(1, 2)
        y = torch.bmm(x.reshape(-1, GROUPS, self.in_features).transpose(0, 1), weight).transpose(0, 1)
        return y.reshape(*x.shape[:-2], GROUPS, -1)


class Model(nn.Module):
    def __init__(self, kind: type[nn.Linear] = Grouped, out: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.start = nn.Linear(WIDTH, GROUPS * WIDTH)
        self.layer = kind(WIDTH, out, bias=False)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.start(x)).unflatten(-1, (GROUPS, WIDTH)))


def adapted(method: str, fields: dict[str, Any], model: Model) -> Model:
    torch.manual_seed(1)
    peftcore.apply(model, method, target_modules=["layer"], **fields)
    disturb(model, "default", 2)
    return model


def effective_weight(method: str, fields: dict[str, Any], out: int) -> Tensor:
    """Return the weight that the method makes of the same weight in a plain linear layer."""
    layer = adapted(method, fields, Model(nn.Linear, out)).layer
    with torch.no_grad():
        rows = layer(torch.eye(WIDTH, dtype=torch.float64))
        assert torch.equal(layer(torch.zeros(1, WIDTH, dtype=torch.float64)), torch.zeros(1, out, dtype=torch.float64))
    return rows.T


X = torch.linspace(-1, 1, 3 * 5 * WIDTH, dtype=torch.float64).sin().view(3, 5, WIDTH)


def close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)  # merged in float32


@pytest.mark.filterwarnings("ignore:.*lora_dropout.*")
@pytest.mark.parametrize("method", RIGHT)
def test_own_forward_runs_on_the_effective_weight(method: str) -> None:
    fields = RIGHT[method]
    for out in (24, GROUPS):  # with one output in each group, a wrong sum would broadcast
        if out == GROUPS and method not in ("loha", "ia3", "lora"):
            continue
        wanted, base = Model(out=out), Model(out=out)
        wanted.layer.weight.data = effective_weight(method, fields, out)
        model = adapted(method, fields, Model(out=out))
        assert close(model(X), wanted(X))
        assert not torch.allclose(model(X), base(X), atol=1e-3)
        model.train()
        model(X).square().sum().backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained)
        model.eval()
        peftcore.merge(model, undo=True)
        assert close(model(X), wanted(X))


@pytest.mark.parametrize("method", REFUSED)
def test_refused_by_apply(method: str) -> None:
    why, fields = REFUSED[method]
    model = Model()
    with pytest.raises(peftcore.PeftcoreError, match=rf"'layer'.*{why}.*exclude_modules=\['layer'\]"):
        peftcore.apply(model, method, target_modules=["layer"], **fields)
    assert torch.equal(model(X), Model()(X))


@pytest.mark.filterwarnings("ignore:quantize leaves layers")
def test_qlora_runs_the_own_forward() -> None:
    model = Model().float()
    peftcore.apply(model, "qlora", target_modules=["layer"])
    disturb(model, "default", 2)
    found = model(X.float())
    peftcore.merge(model, undo=True)
    wanted = model(X.float())
    assert found.shape == wanted.shape == (3, 5, GROUPS, 6)
    assert torch.allclose(found, wanted, atol=1e-5)  # the layer itself stays dense


def test_every_method_of_layers_is_tested() -> None:
    with_targets = {name for name, each in registry.methods().items() if hasattr(each.config_class, "target_modules")}
    assert with_targets <= {*RIGHT, *REFUSED, *OF_OTHER_LAYERS}


def test_two_adapters_files_and_samples() -> None:
    model = Model()
    peftcore.apply(model, "ia3", adapter="inner", target_modules=["layer"])
    peftcore.apply(model, "loha", adapter="outer", target_modules=["layer"])
    alone = {}
    for seed, name in enumerate(("inner", "outer")):
        disturb(model, name, seed)
        peftcore.activate(model, name)
        alone[name] = model(X)
        with tempfile.TemporaryDirectory() as folder:
            peftcore.save(model, folder, adapter=name)
            loaded = Model()
            peftcore.load(loaded, folder)
        assert torch.equal(loaded(X), alone[name])
    peftcore.activate(model, ["inner", "outer", None], per_sample=True)
    found, base = model(X), Model()(X)
    for i, wanted in enumerate((alone["inner"], alone["outer"], base)):
        assert torch.allclose(found[i], wanted[i])
    peftcore.activate(model, ["inner", "outer"])
    both = copy.deepcopy(model)(X)
    change = alone["outer"] - base
    assert close(both, alone["inner"] + change)  # l ⊙ W x + D x
