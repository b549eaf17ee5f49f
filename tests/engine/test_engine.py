"""Apply, activate, disable, remove: what each changes, what each refuses."""

import importlib

import pytest
import torch
from support import tiny
from torch import nn

import peftcore
from peftcore.engine import adapter_parameters, applied, set_trainable
from peftcore.plugin import After, Around, Train
from peftcore.plugin.registry import registry
from peftcore.testing.families import FAMILIES

pytestmark = pytest.mark.usefixtures("toys")


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_apply_freezes_the_base_and_trains_the_adapter() -> None:
    model = tiny.llama()
    assert peftcore.apply(model, "around") is model
    assert trainable(model) == [f"model.layers.{i}.self_attn.q_proj.peftcore.default.gain" for i in range(2)]


@pytest.mark.parametrize("kind", ["around", "after", "soft", "prefix"])
def test_each_placement_acts_rests_and_leaves(kind: str) -> None:
    model = tiny.llama()
    base, state = tiny.logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    peftcore.apply(model, kind)
    acting = tiny.logits(model)
    assert acting.shape == base.shape
    assert (acting - base).abs().max() > 1e-3
    with peftcore.disabled(model):
        assert torch.equal(tiny.logits(model), base)
    assert torch.equal(tiny.logits(model), acting)
    peftcore.remove(model)
    assert torch.equal(tiny.logits(model), base)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_disabled_with_gradients_is_the_frozen_base() -> None:
    """A trainable T5 may differ in the last digits: PyTorch's attention looks at requires_grad of the mask."""
    model = FAMILIES["T5"].make().requires_grad_(False)
    inputs = FAMILIES["T5"].inputs(model, 2)
    base = model(**inputs).logits
    peftcore.apply(model, "lora", target_modules=["q", "v"])
    with peftcore.disabled(model):
        assert torch.equal(model(**inputs).logits, base)


def test_train_placement_acts_rests_and_leaves() -> None:
    model = tiny.llama()
    base, parameter = tiny.logits(model), model.lm_head.weight
    peftcore.apply(model, "train", names=("lm_head.weight",))
    assert trainable(model) == ["lm_head.weight"]
    assert torch.equal(tiny.logits(model), base)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(tiny.logits(model), 2 * base)
    with peftcore.disabled(model):
        assert torch.equal(tiny.logits(model), base)
    peftcore.remove(model)
    assert model.lm_head.weight is parameter
    assert torch.equal(tiny.logits(model), base)


def test_a_config_that_is_changed_afterwards_is_not_the_adapters() -> None:
    kind = registry.method("around").config_class
    config, targets = kind(["q_proj"]), ["q_proj"]
    model = peftcore.apply(tiny.llama(), config)
    peftcore.apply(model, "after", adapter="second", target_modules=targets)
    config.target_modules.append("v_proj")
    targets.append("v_proj")
    object.__setattr__(config, "value", 5.0)
    assert applied(model, "default").config == kind(["q_proj"])
    assert applied(model, "second").config.target_modules == ["q_proj"]


def test_a_second_apply_leaves_the_first_trainable() -> None:
    model = peftcore.apply(tiny.llama(), "around")
    peftcore.apply(model, "after", adapter="second")
    assert len(trainable(model)) == 3


def test_adapters_of_several_methods_compose_in_order() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    x = torch.eye(2)
    peftcore.apply(model, "around", target_modules=("0",), value=2.0, adapter="two")
    peftcore.apply(model, "around", target_modules=("0",), value=5.0, adapter="five")
    torch.testing.assert_close(model(x), 10 * model[0].weight.T)
    peftcore.activate(model, "five")
    torch.testing.assert_close(model(x), 5 * model[0].weight.T)
    peftcore.activate(model, [])
    torch.testing.assert_close(model(x), model[0].weight.T)


def test_activate_freezes_those_at_rest() -> None:
    model = peftcore.apply(tiny.llama(), "around", adapter="a")
    peftcore.apply(model, "around", adapter="b")
    peftcore.activate(model, "b")
    assert all(".peftcore.b." in name for name in trainable(model))


def test_requires_grad_comes_back() -> None:
    model = tiny.llama()
    model.lm_head.weight.requires_grad_(False)
    peftcore.remove(peftcore.apply(model, "around"))
    assert not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad


def test_disabled_comes_back_after_an_exception() -> None:
    model = peftcore.apply(tiny.llama(), "around")
    acting = tiny.logits(model)
    with pytest.raises(RuntimeError, match="inside"), peftcore.disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(tiny.logits(model), acting)


@pytest.mark.parametrize(
    ("base", "asked", "wanted"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_of_the_adapter(base, asked, wanted) -> None:
    model = peftcore.apply(tiny.llama().to(base), "around", dtype=asked)
    assert {p.dtype for _, p in adapter_parameters(model, "default")} == {wanted}


def test_an_adapter_made_in_inference_mode_trains() -> None:
    model = tiny.llama()
    with torch.inference_mode():
        peftcore.apply(model, "around")
    tiny.logits(model)
    model(**tiny.inputs(model)).logits.sum().backward()
    assert all(p.grad is not None for _, p in adapter_parameters(model, "default"))


def test_the_adapter_takes_the_mode_of_its_module() -> None:
    model = peftcore.apply(tiny.llama().train(), "around")
    assert all(module.training for module in model.modules())
    model = peftcore.apply(tiny.llama().eval(), "around")
    assert not any(module.training for module in model.modules())


def test_two_cannot_train_one_parameter_at_a_time_but_in_turn() -> None:
    model = tiny.llama()
    base = tiny.logits(model)
    peftcore.apply(model, "train", names=("lm_head.weight",), adapter="a")
    with pytest.raises(peftcore.PeftcoreError, match=r"the active adapter 'a' already trains 'lm_head.weight'"):
        peftcore.apply(model, "train", names=("lm_head.weight",), adapter="b")
    peftcore.activate(model, [])
    peftcore.apply(model, "train", names=("lm_head.weight",), adapter="b")
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    with pytest.raises(peftcore.PeftcoreError, match="two active adapters cannot train the same"):
        peftcore.activate(model, ["a", "b"])
    peftcore.activate(model, "a")
    assert torch.equal(tiny.logits(model), base)
    peftcore.activate(model, "b")
    torch.testing.assert_close(tiny.logits(model), 3 * base)
    peftcore.remove(model, "b")
    peftcore.remove(model, "a")
    assert torch.equal(tiny.logits(model), base)


def test_tied_parameters_are_trained_as_one() -> None:
    model = tiny.gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    peftcore.apply(model, "train", names=("lm_head.weight",))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert trainable(model) == ["transformer.wte.weight"]
    peftcore.activate(model, [])
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: peftcore.apply(m, "nope"),
            r"no PEFT method 'nope' is installed.*\. Methods are .* Installed: .*around",
        ),
        (lambda m: peftcore.apply(m, "arond"), r"nearest: 'around'"),
        (lambda m: peftcore.apply(m, "around", valu=1), r"has no field 'valu' \(nearest: 'value'"),
        (lambda m: peftcore.apply(m, "around", adapter="a.b"), r"the adapter name 'a.b' contains '.'"),
        (lambda m: peftcore.apply(m, "around", adapter="../x"), r"contains"),
        (lambda m: peftcore.apply(m, "around", adapter=""), r"non-empty string"),
        (lambda m: peftcore.apply(m, "around", adapter="train"), r"attribute of torch.nn.Module"),
        (
            lambda m: peftcore.apply(m, "train", names=("lm_head.wait",)),
            r"not a parameter of the model \(nearest: 'lm_head.weight'",
        ),
        (lambda m: peftcore.apply(m, "train"), r"does not adapt any module of LlamaForCausalLM"),
        (lambda m: peftcore.apply(m, object()), r"object is not the config of an installed method"),
        (
            lambda m: peftcore.merge(m, keep_adapters=True),
            r"merge has no argument 'keep_adapters'\. Did you mean 'undo'\? Its arguments: model, undo",
        ),
        (lambda m: peftcore.load(m, "x", adapter_name="a"), r"'adapter_name'\. Did you mean 'adapter'\?"),
        (
            lambda m: peftcore.remove(m, adaptor="a"),
            r"'adaptor' \(nearest: 'adapter'\)\. Its arguments: model, adapter",
        ),
        (lambda m: peftcore.activate(m, "x"), r"no adapter is applied"),
        (lambda m: peftcore.remove(m, "x"), r"no adapter is applied"),
        (lambda m: peftcore.save(m, "nowhere", adapter="x"), r"no adapter is applied"),
        (lambda m: peftcore.apply(torch.compile(m, backend="eager"), "around"), r"to a compiled model"),
    ],
)
def test_refusals_leave_the_model_alone(call, message: str) -> None:
    model = tiny.llama()
    with pytest.raises(peftcore.PeftcoreError, match=message):
        call(model)
    assert type(model).__dict__.get("_peftcore_original") is None
    assert all(p.requires_grad for p in model.parameters())
    assert not any("peftcore" in key for key in model.state_dict())


@pytest.mark.parametrize("has_other", [False, True])
@pytest.mark.parametrize("step", ["engine.adaptation.adapted.attach", "engine.trained_parameters.mark_as_loaded"])
def test_an_apply_that_fails_midway_leaves_the_model_as_it_was(step: str, has_other: bool, monkeypatch) -> None:
    model = peftcore.apply(tiny.llama(), "around", adapter="other") if has_other else tiny.llama()
    outputs, keys, classes = tiny.logits(model), list(model.state_dict()), list(map(type, model.modules()))
    trains = [parameter.requires_grad for parameter in model.parameters()]
    package, _, name = f"peftcore.{step}".rpartition(".")
    real, calls = getattr(importlib.import_module(package), name), iter(range(9))

    def fails_second(*args, **kwargs):
        if next(calls) == 1:
            raise MemoryError
        return real(*args, **kwargs)

    def place(model, config, architecture):
        paths = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
        names = ("lm_head.weight", "model.norm.weight")
        return [Train(names), *(Around(path, tiny.Scaled(2.0)) for path in paths)]

    with tiny.installed(tiny.method("both", place)):
        with monkeypatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr(f"{package}.{name}", fails_second)
            peftcore.apply(model, "both")
        assert list(model.state_dict()) == keys and (has_other or list(map(type, model.modules())) == classes)
        assert [parameter.requires_grad for parameter in model.parameters()] == trains
        assert torch.equal(tiny.logits(model), outputs)
        peftcore.apply(model, "both")
        assert not torch.equal(tiny.logits(model), outputs)


def test_a_name_twice_is_refused_and_the_first_stays() -> None:
    model = peftcore.apply(tiny.llama(), "around")
    acting = tiny.logits(model)
    with pytest.raises(peftcore.PeftcoreError, match=r"already has an adapter 'default' \(around\).*remove"):
        peftcore.apply(model, "after")
    assert torch.equal(tiny.logits(model), acting)


def test_unknown_adapters_are_named_with_the_nearest() -> None:
    model = peftcore.apply(tiny.llama(), "around", adapter="french")
    with pytest.raises(peftcore.PeftcoreError, match=r"no adapter 'frensh' is applied \(applied: french\).*'french'"):
        peftcore.activate(model, "frensh")


def test_two_adapters_at_one_path_are_refused() -> None:
    def twice(model, config, architecture):
        return [Around("lm_head", tiny.Scaled(1.0)), After("lm_head", tiny.Shifted(1.0))]

    with tiny.installed(tiny.method("twice", twice)), pytest.raises(peftcore.PeftcoreError, match="two adapters on"):
        peftcore.apply(tiny.llama(), "twice")


def test_statistics_that_training_moves_are_the_adapters() -> None:
    """A BatchNorm in training mode counts; what it counts acts, rests, leaves and changes hands with the adapter."""
    model = tiny.batchnorm_net()
    base, state = model(tiny.IMAGES), {k: v.clone() for k, v in model.state_dict().items()}
    peftcore.apply(model, "around", target_modules=("head",), value=1.0)
    assert torch.equal(model(tiny.IMAGES), base)
    model.train()(tiny.IMAGES)
    first = model.eval()(tiny.IMAGES)
    assert (first - base).abs().max() > 0.01
    with peftcore.disabled(model):
        assert torch.equal(model(tiny.IMAGES), base)
        model.train()(tiny.IMAGES)  # a trainer's reference, say
        model.eval()
    assert torch.equal(model(tiny.IMAGES), first)
    peftcore.apply(model, "around", target_modules=("head",), value=1.0, adapter="second")
    assert torch.equal(model(tiny.IMAGES), first)
    model.train()(tiny.IMAGES)
    second = model.eval()(tiny.IMAGES)
    for names, wanted in ((["default"], first), (["default", "second"], second), ([], base), (["second"], second)):
        peftcore.activate(model, names)
        assert torch.equal(model(tiny.IMAGES), wanted)
    with pytest.raises(peftcore.PeftcoreError, match=r"acts on the batch as a whole"):
        peftcore.activate(model, ["default", "second", None, None], per_sample=True)
    peftcore.remove(model, "default")
    peftcore.remove(model, "second")
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("inside", [False, True])
def test_a_model_of_peft_is_refused_with_the_way_to_convert(inside: bool) -> None:
    import peft

    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["q_proj"]))
    model = model.base_model.model if inside else model
    keys = list(model.state_dict())
    for call in (peftcore.apply, peftcore.plan):
        with pytest.raises(
            peftcore.PeftcoreError, match=r"already has adapters of Hugging Face PEFT .*peftcore.load\(base, folder\)"
        ):
            call(model, "lora")
    assert list(model.state_dict()) == keys


def test_adapters_of_a_part_and_of_the_whole_are_refused() -> None:
    """Both would have one name, and one would switch off the other's."""
    model = tiny.llama()
    peftcore.apply(model.model, "around")
    with pytest.raises(peftcore.PeftcoreError, match="'model' has adapters that were applied to a submodule"):
        peftcore.apply(model, "around")
    peftcore.remove(model.model)
    peftcore.apply(model, "around")
    with pytest.raises(peftcore.PeftcoreError, match="'the model' has adapters that were applied to a submodule"):
        peftcore.apply(model.model, "around", adapter="other")
    with pytest.raises(peftcore.PeftcoreError, match="cannot quantize a model with adapters"):
        peftcore.quantize(model.model)


class Odd:
    """Not of any type that a function takes."""

    def __repr__(self) -> str:
        return "Odd()"


ODD = [5, 1.5, b"default", Odd(), ["default", 5], {"default": 1}, object, True]


@pytest.mark.parametrize("odd", ODD, ids=repr)
@pytest.mark.parametrize(
    "call",
    [
        lambda odd, m: peftcore.apply(odd, "around"),
        lambda odd, m: peftcore.apply(m, odd),
        lambda odd, m: peftcore.apply(m, "around", adapter=odd),
        lambda odd, m: peftcore.apply(m, "around", adapter="new", dtype=odd),
        lambda odd, m: peftcore.plan(odd, "around"),
        lambda odd, m: peftcore.plan(m, odd),
        lambda odd, m: peftcore.plan(m, "around", dtype=odd),
        lambda odd, m: peftcore.activate(odd, "default"),
        lambda odd, m: peftcore.activate(m, odd),
        lambda odd, m: peftcore.activate(m, [odd], per_sample=True),
        lambda odd, m: peftcore.remove(odd),
        lambda odd, m: peftcore.remove(m, odd),
        lambda odd, m: peftcore.after_step(odd, 1, 2),
        lambda odd, m: peftcore.summary(odd),
        lambda odd, m: set_trainable(m, odd, True),
        lambda odd, m: peftcore.merge(odd, undo=True),
        lambda odd, m: peftcore.unmerge(odd),
        lambda odd, m: peftcore.disabled(odd).__enter__(),
    ],
)
def test_arguments_of_no_use_are_peftcore_errors(call, odd) -> None:
    model = peftcore.apply(tiny.llama(), "around")
    with pytest.raises(peftcore.PeftcoreError):
        call(odd, model)
    assert peftcore.engine.state_of(model).active == ("default",)


@pytest.mark.parametrize("names", [["default", None], [None], None])
def test_none_among_the_names_asks_for_per_sample(names) -> None:
    model = peftcore.apply(tiny.llama(), "around")
    with pytest.raises(peftcore.PeftcoreError, match="per_sample=True" if names else "list of names, found None"):
        peftcore.activate(model, names)


def test_a_wrapper_is_refused_with_the_model_inside() -> None:
    model = peftcore.apply(tiny.llama(), "around")
    with pytest.raises(peftcore.PeftcoreError, match=r"the wrapped model. Pass model\._orig_mod"):
        peftcore.activate(torch.compile(model, backend="eager"), "default")
    with pytest.raises(peftcore.PeftcoreError, match=r"the wrapped model. Pass model\.module"):
        peftcore.save(nn.DataParallel(model), "nowhere")


def test_a_lazy_module_is_refused_until_it_has_run() -> None:
    model = torch.nn.Sequential(torch.nn.LazyLinear(4))
    with pytest.raises(peftcore.PeftcoreError, match=r"'0.weight' of a lazy module has no shape yet"):
        peftcore.apply(model, "around", target_modules=("0",))
    model(torch.randn(2, 3))
    peftcore.apply(model, "around", target_modules=("0",))


def test_a_name_that_is_not_text_is_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"the adapter name 'a\\ud800' contains half a surrogate pair"):
        peftcore.apply(tiny.llama(), "lora", adapter="a\ud800", target_modules=["q_proj"])


def test_a_forward_pre_hook_that_returns_nothing_may_activate() -> None:
    model = peftcore.apply(tiny.llama(), "around")
    adapted = tiny.logits(model)
    peftcore.activate(model, [])
    assert not torch.equal(tiny.logits(model), adapted)

    def activated(module: nn.Module, _args: object) -> None:
        peftcore.activate(module, "default")

    model.register_forward_pre_hook(activated)
    assert torch.equal(tiny.logits(model), adapted)
