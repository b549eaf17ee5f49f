"""What two ranks of tests/distributed/test_tensor_parallel.py do, each with half of the layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn

import peftcore
from peftcore.engine.adaptation.chain import OwnForward
from peftcore.engine.adaptation.tensor_parallel import Division
from peftcore.engine.state import state_of
from peftcore.plugin import AdapterModules, After, AtModule, Link, ranks, sharded
from peftcore.testing import disturb
from support import tiny
from support.ranks import work
from support.ranks.bases import adapted, base
from support.ranks.work import TOKENS, farthest, optimizer_of, values


class BeforeLink(Link):
    def __call__(self, x: Tensor) -> Any:
        return self.inside(self.adapter(x))


@dataclass(frozen=True)
class Before(AtModule):
    """A kind of a plugin's own: the adapter changes the input of the layer."""

    path: str
    adapter: nn.Module
    link = BeforeLink


_UNUSED: list[nn.Module] = []  # bases that have no adapter now


def divided(folder: str, kind: str = "llama") -> nn.Module:
    """A base of which each rank has half; one whose last adapter was removed serves again."""
    return _UNUSED.pop() if _UNUSED and kind == "llama" else base(folder, kind, tp_size=2)


def logits(found: nn.Module, **call: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = found.eval()(input_ids=TOKENS, **call).logits
    return result


def off(found: Tensor, wanted: Tensor) -> float:
    return (found - wanted).abs().max().item()


def spread_over_ranks(found: nn.Module) -> float:
    """Largest difference of an adapter's values between the ranks."""
    worst = 0.0
    for value in values(found).values():
        everyone = [torch.empty_like(value) for _ in range(ranks.count())]
        distributed.all_gather(everyone, value.contiguous())
        worst = max(worst, off(everyone[0], everyone[1]))
    return worst


def against_one_process(case: str, folder: str) -> dict[str, float | str]:
    """Differences of one method from one process, by what is compared."""
    kind = {"bitfit": "odd", "qlora": "blocks"}.get(case, "llama")  # with biases; with halves of whole blocks
    spread = divided(folder, kind)
    try:
        adapted(spread, case)
    except peftcore.PeftcoreError as error:
        assert state_of(spread) is None  # a refusal leaves it as it was
        _UNUSED.append(spread)
        return {"refused": str(error)}
    found: dict[str, float | str] = {}
    alone = adapted(base(folder, kind), case)
    losses, trained = [], []
    for each in (alone, spread):
        torch.manual_seed(0)
        loss = work.loss(each, TOKENS) + peftcore.extra_loss(each)
        loss.backward()
        losses.append(loss.item())
        trained.append(values(each, "grad"))
    assert max(gradient.abs().max().item() for gradient in trained[0].values()) > 1e-5
    found["gradients"] = max(farthest(trained[1], trained[0]), abs(losses[1] - losses[0]))
    for each in (alone, spread):
        torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1, foreach=False).step()
    found["step"] = farthest(values(spread), values(alone))
    optimizer = optimizer_of(spread)
    for seed in range(2):
        torch.manual_seed(seed)
        work.step(spread, TOKENS, optimizer)
    found["ranks"] = spread_over_ranks(spread)

    wanted, where = logits(spread), f"{folder}/{case}"
    peftcore.save(spread, f"{where}, two")
    distributed.barrier()
    alone = peftcore.load(in_bits(base(folder, kind), case), f"{where}, two")
    found["loaded by one"] = off(logits(alone), wanted)
    if ranks.rank() == 0:
        peftcore.save(alone, f"{where}, one")
    distributed.barrier()
    again = peftcore.load(in_bits(divided(folder, kind), case), f"{where}, one")
    found["loaded by two"] = off(logits(again), wanted)
    given_back(peftcore.remove(again), kind)

    weights = {name: sharded.whole(p).clone() for name, p in spread.named_parameters()}
    dense = {"dtype": torch.float32} if case == "qlora" else {}
    try:
        peftcore.merge(spread, **dense, undo=True)
    except peftcore.PeftcoreError as error:
        found["merged"] = str(error)
        given_back(peftcore.remove(spread), kind)
    else:
        found["merged"] = off(logits(spread), wanted)
        peftcore.unmerge(spread)
        assert all(torch.equal(sharded.whole(p), weights[name]) for name, p in spread.named_parameters())
        peftcore.merge(spread, **dense)
        found["merged"] = max(found["merged"], off(logits(spread), wanted))
    return found


def in_bits(found: nn.Module, case: str) -> nn.Module:
    """The base of an adapter in a file, which does not quantize it."""
    return peftcore.quantize(found, blocksize=32) if case == "qlora" else found


def given_back(found: nn.Module, kind: str) -> None:
    if kind == "llama" and state_of(found) is None:
        _UNUSED.append(found)


def table(folder: str, cases: list[str]) -> dict[str, dict[str, float | str]]:
    warnings.simplefilter("ignore")
    return {case: against_one_process(case, folder) for case in cases}


def by_hooks(
    folder: str, kind: str = "llama", quantize: Callable[[nn.Module], nn.Module] | None = None, **styles: Any
) -> nn.Module:
    """A base that PyTorch's `parallelize_module` divides, and that `quantize` has quantized before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    for name in ("q_proj", "k_proj", "v_proj"):
        plan[f"model.layers.*.self_attn.{name}"] = ColwiseParallel()
    for name in ("gate_proj", "up_proj"):
        plan[f"model.layers.*.mlp.{name}"] = ColwiseParallel()
    plan |= {"model.layers.*.self_attn.o_proj": RowwiseParallel(), "model.layers.*.mlp.down_proj": RowwiseParallel()}
    found = base(folder, kind) if quantize is None else quantize(base(folder, kind))
    return parallelize_module(found, init_device_mesh("cpu", (2,)), plan | styles)


TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]
BOTH: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS}


def pair(folder: str, kind: str = "llama", *adapters: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """(model in one process, on two ranks) with the adapters, of which the first is named default."""
    found = []
    for model in (base(folder, kind), base(folder, kind, tp_size=2)):
        for number, fields in enumerate(adapters or (BOTH,)):
            torch.manual_seed(7)
            name, own = f"a{number}" if number else "default", dict(fields)
            peftcore.apply(model, own.pop("method", "lora"), adapter=name, **own)
            if "init_lora_weights" not in own:
                disturb(model, name, seed=number, std=0.05)
        found.append(model.train())
    return found[0], found[1]


def gradients(alone: nn.Module, spread: nn.Module) -> float:
    """Largest difference of a gradient."""
    for each in (alone, spread):
        torch.manual_seed(0)
        work.loss(each, TOKENS).backward()
    found = farthest(values(spread, "grad"), values(alone, "grad"))
    for each in (alone, spread):
        each.zero_grad()
    return found


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except peftcore.PeftcoreError as error:
        return str(error)
    return "nothing was raised"


def resumed(folder: str) -> dict[str, float | str]:
    """Differences of losses after a checkpoint of two ranks, from a run in one process without an interruption."""
    state = lambda model, optimizer: {"training": peftcore.TrainingState(model, optimizer)}  # noqa: E731
    models = [*pair(folder), *pair(folder)]
    optimizers = [optimizer_of(each) for each in models]
    wanted = [work.step(models[0], TOKENS, optimizers[0]) for _ in range(3)]
    for _ in range(2):
        work.step(models[1], TOKENS, optimizers[1])
    dcp.save(state(models[1], optimizers[1]), checkpoint_id=f"{folder}/state")
    found: dict[str, float | str] = {}
    for count, model, optimizer in zip(("one", "two"), models[2:], optimizers[2:], strict=True):
        dcp.load(state(model, optimizer), checkpoint_id=f"{folder}/state")
        found[f"resumed by {count}"] = abs(work.step(model, TOKENS, optimizer) - wanted[-1])
    return found


def of_lora(folder: str, whole: bool) -> dict[str, float | str]:
    """LoRA in every way that a layer is divided, and what else is done with its adapters; the base is in float64."""
    warnings.simplefilter("ignore")
    found: dict[str, float | str] = {}
    with pytest.MonkeyPatch.context() as patch:  # no activation is gathered
        patch.setattr(Division, "gathered", lambda *_: pytest.fail("gathered"))
        alone, spread = pair(folder)
        found["gradients"] = gradients(alone, spread)
        found["float64"] = gradients(alone.double(), spread.double())
        spread.gradient_checkpointing_enable({"use_reentrant": False})
        found["checkpointing"] = gradients(alone, spread)
        # In one process dropout has a kernel of its own, with another mask.
        patch.setattr(OwnForward, "linear_operands", lambda self, x: None)
        # The biases and the width of "odd" are not divided equally.
        found["dropout"] = gradients(*pair(folder, "odd", {**BOTH, "lora_dropout": 0.3, "lora_bias": True}))
    found["embedding, head"] = gradients(
        *pair(folder, "llama", {"r": 3, "target_modules": ["embed_tokens", "lm_head"]})
    )
    batches = [{"input_ids": TOKENS, "labels": TOKENS}] * 2
    eva = {**BOTH, "init_lora_weights": "eva", "batches": batches}
    found["eva"] = gradients(*pair(folder, "llama", eva))
    if whole:
        found["pissa"] = gradients(*pair(folder, "llama", {**BOTH, "init_lora_weights": "pissa"}))
        found["eva behind another"] = gradients(*pair(folder, "llama", BOTH, eva))
        found |= resumed(folder)

    alone, spread = pair(folder, "llama", BOTH, {"method": "ia3"}, {**BOTH, "r": 2})
    found["several"] = gradients(alone, spread)
    names = ["default", "a2", "__base__", "a1", "default", "a2"]
    found["for each sample"] = off(logits(spread, adapter_names=names), logits(alone, adapter_names=names))
    generated = [each.eval().generate(TOKENS, max_new_tokens=3, adapter_names=names) for each in (alone, spread)]
    found["generated"] = float(not torch.equal(*generated))
    for each in (alone, spread):
        peftcore.activate(each, ["a2"])
    found["one of them"] = off(logits(spread), logits(alone))
    with peftcore.disabled(spread), peftcore.disabled(alone):
        found["disabled"] = off(logits(spread), logits(alone))
    found["merge one"] = off(logits(peftcore.merge(spread, undo=True)), logits(alone))
    for name in ("default", "a1", "a2"):
        peftcore.remove(peftcore.unmerge(spread) if name == "default" else spread, name)
    found["removed"] = off(logits(spread), logits(base(folder, "llama")))

    torch.manual_seed(ranks.rank())
    peftcore.apply(spread.train(), "lora", **BOTH)
    found["random start"] = spread_over_ranks(spread)
    found["batches"] = message_of(lambda: spread(input_ids=TOKENS + ranks.rank()))
    found["random states"] = message_of(lambda: spread(input_ids=TOKENS))
    found["shard"] = message_of(lambda: peftcore.shard(spread))
    with tiny.installed(tiny.method("before", _before)):
        alone, spread = pair(folder, "llama", {"method": "before"})
        found["before layers"] = gradients(alone, spread)
        found["before layers, logits"] = off(logits(spread), logits(alone))
    with tiny.installed(tiny.method("behind", lambda *_: [After("model.layers.0.self_attn.q_norm", nn.Identity())])):
        found["a norm of heads"] = message_of(lambda: peftcore.apply(base(folder, "qwen3", tp_size=2), "behind"))
    return found


def random_start_of_trained(folder: str) -> float:
    """Largest difference between the ranks of a base parameter that a method trains from random values."""

    def draw(model: nn.Module, adapters: AdapterModules, config: Any, batches: Any) -> None:
        for parameter in adapters.trained.values():
            parameter.normal_()

    torch.manual_seed(ranks.rank())
    with tiny.installed(tiny.method("drawing", tiny.PLACES["train"], initialize=draw)):
        model = peftcore.apply(base(folder, "llama", tp_size=2), "drawing", names=("model.norm.weight",))
    return spread_over_ranks(model)


def _before(model: nn.Module, *_: Any) -> list[Before]:
    """Placements at a layer that is divided along its inputs, and at one that is along its outputs."""
    attention, mlp = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    return [Before(path, nn.Linear(in_of(model, path), in_of(model, path))) for path in (attention, mlp)]


def in_of(model: nn.Module, path: str) -> int:
    found: Any = model.get_submodule(path)
    return int(found.in_features)


def of_trained(folder: str, whole: bool) -> dict[str, float | str]:
    """Parameters of divided layers that adapters train: `modules_to_save`, and norms of single heads."""
    found: dict[str, float | str] = {}
    saved = {**BOTH, "modules_to_save": ["embed_tokens", "lm_head"]}
    alone, spread = pair(folder, "llama", saved)
    found["modules_to_save"] = gradients(alone, spread)
    found["modules_to_save, logits"] = off(logits(spread), logits(alone))
    with peftcore.disabled(spread), peftcore.disabled(alone):
        found["modules_to_save, disabled"] = off(logits(spread), logits(alone))
    # Each backward pass joins the gradients of its own heads, not those that earlier passes have left.
    norms = pair(folder, "qwen3", {"method": "ln-tuning"})
    for each in norms:
        for scale in (1.0, 3.0):
            (scale * work.loss(each.train(), TOKENS)).backward()
    found["norms of heads, two passes"] = farthest(values(norms[1], "grad"), values(norms[0], "grad"))
    for each in norms:
        peftcore.activate(each, [])
        peftcore.apply(each, "ln-tuning", adapter="other")
        peftcore.remove(each, "default")
        for scale in (1.0, 3.0):
            (scale * work.loss(each, TOKENS)).backward()
    remaining = [values(each, "grad", "other") for each in norms]
    found["norms of heads, the first adapter removed"] = farthest(*remaining)
    if whole:
        tied = {"method": "bitfit"}, {"method": "dora", **BOTH}
        found["biases under DoRA"] = gradients(*pair(folder, "odd", *tied))
        found["head of both"] = gradients(
            *pair(folder, "llama", {"r": 3, "target_modules": ["lm_head"]}, {**BOTH, "modules_to_save": ["lm_head"]})
        )
    peftcore.remove(spread)
    found["removed, trained"] = off(logits(spread), logits(base(folder, "llama")))
    return found


def of_tied(folder: str) -> dict[str, float | str]:
    """Trained rows of an embedding that the head shares."""
    found: dict[str, float | str] = {}
    rows = {"method": "trainable-tokens", "token_indices": [29, 5]}, {**BOTH, "trainable_token_indices": [29, 5]}
    for fields in rows:
        name = f"tied, {fields.get('method', 'lora')}"
        alone, spread = pair(folder, "tied", fields)
        found[f"{name}, gradients"] = gradients(alone, spread)
        wanted = logits(spread)
        found[f"{name}, logits"] = off(wanted, logits(alone))
        peftcore.save(spread, f"{folder}/{name}")
        distributed.barrier()
        for count, divided in (("one", {}), ("two", {"tp_size": 2})):
            loaded = peftcore.load(base(folder, "tied", **divided), f"{folder}/{name}")
            found[f"{name}, loaded by {count}"] = off(logits(loaded), wanted)
    return found


class OfTokens(nn.Module):
    """Two layers, of which each rank computes its part, for its tokens of the whole input `[batch, tokens, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.count = nn.Linear(8, 12), nn.Linear(12, 8), 1

    def forward(self, x: Tensor) -> Tensor:
        rank = ranks.rank() if self.count > 1 else 0
        return self.down(self.up(x.chunk(self.count, 1)[rank]).relu())


def sequence_parallel() -> float:
    """Largest difference of a gradient of LoRA on layers whose outer layouts divide tokens."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    alone, spread = OfTokens().double(), OfTokens().double()
    plan = {"up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1))}
    parallelize_module(spread, init_device_mesh("cpu", (2,)), plan)
    spread.count = 2
    for each in (alone, spread):
        torch.manual_seed(7)
        peftcore.apply(each, "lora", r=3, target_modules=["up", "down"])
        disturb(each, "default", seed=1, std=0.5)
        each(torch.arange(64, dtype=torch.float64).view(2, 4, 8).sin()).square().sum().backward()
    return farthest(values(spread, "grad"), values(alone, "grad"))


def of_hooks(folder: str, whole: bool) -> dict[str, float | str]:
    """Adapters on a base that `parallelize_module` has divided."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import RowwiseParallel, SequenceParallel

    found: dict[str, float | str] = {"hooks, sequence parallel": sequence_parallel()}
    cases: dict[str, dict[str, Any]] = {"lora": BOTH}
    if whole:
        cases |= {"dora": {"method": "dora", **BOTH}}
        cases |= {"ia3": {"method": "ia3"}, "prefix": {"method": "prefix-tuning", "num_virtual_tokens": 3}}
        cases |= {"adapter": {"method": "adapter", "bottleneck_size": 5}, "adaption": {"method": "adaption-prompt"}}
        cases["eva"] = {**BOTH, "init_lora_weights": "eva", "batches": [{"input_ids": TOKENS, "labels": TOKENS}]}
        cases["ends"] = {"r": 3, "target_modules": ["embed_tokens", "lm_head"]}
    for name, fields in cases.items():
        models = base(folder, "llama"), by_hooks(folder)
        for model in models:
            torch.manual_seed(7)
            own = dict(fields)
            peftcore.apply(model, own.pop("method", "lora"), **own)
            if "init_lora_weights" not in own:
                disturb(model, "default", seed=1, std=0.05)
            model.train()
        found[f"hooks, {name}"] = gradients(*models)
    alone, spread = models
    found["hooks, logits"] = off(logits(spread), logits(alone))
    peftcore.save(spread, f"{folder}/by hooks")
    found["hooks, loaded"] = off(logits(peftcore.load(base(folder, "llama"), f"{folder}/by hooks")), logits(alone))
    if name != "ends":
        found["hooks, merged"] = off(logits(peftcore.merge(spread, undo=True)), logits(alone))
        peftcore.unmerge(spread)
    peftcore.remove(spread)
    found["hooks, removed"] = off(logits(spread), logits(base(folder, "llama")))
    found["hooks, saved modules"] = message_of(lambda: peftcore.apply(spread, "lora", modules_to_save=["lm_head"]))
    parts = {"model.layers.*.mlp.down_proj": RowwiseParallel(output_layouts=Shard(1))}
    parts["model.norm"] = SequenceParallel()
    found["hooks, tokens"] = message_of(lambda: peftcore.apply(by_hooks(folder, **parts), "adapter"))
    found["hooks, shard"] = message_of(lambda: peftcore.shard(peftcore.apply(spread, "lora", **BOTH)))
    return found


def everything(
    folder: str, cases: list[str], whole: bool
) -> tuple[dict[str, dict[str, float | str]], dict[str, float | str]]:
    found = {**of_lora(folder, whole), **of_trained(folder, whole), **of_tied(folder), **of_hooks(folder, whole)}
    return table(folder, cases), found
