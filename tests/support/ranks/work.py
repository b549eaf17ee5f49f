"""What the ranks of the tests in tests/distributed do. In a module of its own, since their processes import it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

import peftcore
from peftcore.engine import adapter_parameters, set_trainable
from peftcore.engine.replicas import refuse_between_blocks
from peftcore.files.loading import restore
from peftcore.plugin import ranks, sharded
from peftcore.testing import disturb
from support import tiny
from support.mixtures import mixture
from support.ranks.cases import CASES, COMBINED, SHARED_BETWEEN_BLOCKS

TOKENS = torch.randint(3, 90, (6, 7), generator=torch.Generator().manual_seed(3))


@tiny.observed
def model(kind: str = "llama", seed: int = 0) -> nn.Module:
    """A tiny model with a vocabulary of 97, which no even number divides."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        off = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0, "bos_token_id": 1, "eos_token_id": 2}
        return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=36, n_layer=2, n_head=4, n_positions=32, **off))
    if kind != "llama":
        return mixture(kind, vocab_size=97, hidden_size=32, intermediate_size=34, num_local_experts=3)
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 36, "intermediate_size": 45, "num_hidden_layers": 3, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 9 * 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def adapted(case: str = "lora") -> nn.Module:
    kind, _, quantized = CASES[case]
    found = model(kind)
    if quantized:
        peftcore.quantize(found)
    combined(found, case)
    disturb(apply(found, case), "default", seed=1, std=0.05)
    return found.train()


def combined(found: nn.Module, case: str) -> None:
    """Apply what the method of `case` combines, frozen."""
    method, fields = COMBINED.get(case.partition(",")[0], (None, {}))
    for seed, name in enumerate("abc" if method else ""):
        peftcore.apply(found, method, adapter=name, **fields)
        disturb(found, name, seed)
        set_trainable(found, name, False)
        peftcore.activate(found, [])


def apply(found: nn.Module, case: str) -> nn.Module:
    return peftcore.apply(found, case.partition(",")[0], **CASES[case][1])


def loss(found: nn.Module, tokens: Tensor) -> Tensor:
    return found(input_ids=tokens, labels=tokens).loss


def mine(tokens: Tensor = TOKENS) -> Tensor:
    """This rank's rows."""
    return tokens.chunk(ranks.count())[ranks.rank()]


def step(found: nn.Module, tokens: Tensor, optimizer: torch.optim.Optimizer) -> float:
    value = loss(found, tokens)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


def optimizer_of(found: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in found.parameters() if p.requires_grad], lr=0.01, foreach=False)


def values(found: nn.Module, attribute: str | None = None, adapter: str = "default") -> dict[str, Tensor]:
    """Whole parameters of the adapter by name, or their gradients."""
    sharded.reshard(found)
    chosen = ((n, p if attribute is None else getattr(p, attribute)) for n, p in adapter_parameters(found, adapter))
    return {name: sharded.whole(t.detach()).clone() for name, t in chosen if t is not None}


def farthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max((found[name] - wanted[name]).abs().max().item() for name in wanted)


def backward_alone(found: nn.Module) -> None:
    """What the ranks do, one after the other, in one process.

    So it is the whole batch, and what a method draws for a rank's rows, or takes a mean of over them, is the same.
    """
    for rank, rows in enumerate(TOKENS.chunk(ranks.count())):
        torch.manual_seed(rank)
        ((loss(found, rows) + peftcore.extra_loss(found)) / ranks.count()).backward()


def backward_here(spread: nn.Module, bare: nn.Module) -> None:
    """This rank's part of it."""
    torch.manual_seed(ranks.rank())
    (loss(spread, mine()) + peftcore.extra_loss(bare)).backward()


def against_one_process(case: str, how: str) -> tuple[float, float]:
    """(largest difference of a gradient, of a value after one step) from one process on the rows of all ranks."""
    alone, spread = adapted(case), adapted(case)
    bare = spread
    if how == "ddp":
        spread = nn.parallel.DistributedDataParallel(spread)
    else:
        if how == "offload":
            peftcore.shard(spread, offload=True)
        else:
            peftcore.shard(spread, adapter_placement=how.partition(" ")[0])
        frozen = [p for p in bare.parameters() if not p.requires_grad and p.numel() > 1000]
        assert frozen and all(isinstance(p, DTensor) for p in frozen)
    if "checkpointing" in how:
        bare.gradient_checkpointing_enable({"use_reentrant": False})
    backward_alone(alone)
    backward_here(spread, bare)
    wanted = values(alone, "grad")
    assert max(gradient.abs().max().item() for gradient in wanted.values()) > 1e-5
    gradients = farthest(values(bare, "grad"), wanted)
    for trained in (alone, bare):
        trainable = [p for p in trained.parameters() if p.requires_grad]
        torch.optim.SGD(trainable, lr=0.1, foreach=False).step()
    return gradients, farthest(values(bare), values(alone))


def all_against_one_process(hows: list[str], cases: list[str]) -> dict[str, tuple[float, float]]:
    warnings.simplefilter("ignore")
    return {f"{case} / {how}": against_one_process(case, how) for case in cases for how in hows}


def saved(case: str, how: str, folder: str) -> dict[str, Tensor]:
    """Save a sharded adapter, and load it again onto the sharded base it came from."""
    found = adapted(case)
    peftcore.shard(found, adapter_placement=how)
    optimizer = optimizer_of(found)
    step(found, mine(), optimizer)
    wanted = values(found)
    peftcore.save(found, folder)
    step(found, mine(), optimizer)
    assert farthest(values(found), wanted) > 0
    with torch.no_grad():
        found(input_ids=TOKENS)  # leaves the root's parameters whole
    restore(found, folder)
    assert farthest(values(found), wanted) == 0
    return wanted


def save_where_rank_0_cannot(folder: str) -> str:
    found = adapted()
    peftcore.shard(found)
    try:
        peftcore.save(found, folder)
    except peftcore.CheckpointError as error:
        return str(error)
    return "nothing was raised"


def save_in_ddp(folder: str) -> None:
    """Ranks other than 0 neither write nor wait."""
    if ranks.rank() == 1:
        peftcore.save(adapted(), folder)
    distributed.barrier()
    if ranks.rank() == 0:
        peftcore.save(adapted(), f"{folder}/adapter")


def different(what: str) -> str:
    """Ranks that do not hold the same."""
    odd = ranks.rank() == 1
    found = model(seed=0)
    if what == "base" and odd:
        found = model("gpt2")
    fields = {"r": 4 if what == "r" and odd else 3}
    if what == "targets":
        fields["target_modules"] = ["q_proj" if odd else "v_proj"]
    peftcore.apply(found, "lora", **fields)
    try:
        peftcore.shard(found)
    except peftcore.PeftcoreError as error:
        return str(error)
    return "nothing was raised"


def refused() -> list[str]:
    """What a sharded model does not do."""
    told = []
    found, trained = adapted(), adapted("bitfit")
    for one in (found, trained):
        peftcore.shard(one)
    base = peftcore.shard(model())
    calls = [
        lambda: peftcore.merge(found, undo=True),
        lambda: peftcore.remove(adapted_root),
        lambda: peftcore.shard(found, adapter_placement="both"),
        lambda: peftcore.shard(peftcore.apply(base, "lora"), adapter_placement="shard"),
        lambda: peftcore.apply(base, "lora", adapter="other", modules_to_save=["norm"]),
    ]
    adapted_root = peftcore.shard(peftcore.apply(model().model, "prompt-tuning", num_virtual_tokens=2))
    for call in calls:
        try:
            call()
        except peftcore.PeftcoreError as error:
            told.append(str(error))
        else:
            told.append("nothing was raised")
    return told


def curve(how: str, folder: str, begin: int, end: int, case: str = "lora") -> list[float]:
    """Losses of the steps from `begin` to `end`, with a DCP checkpoint before the first, if it is there, and after."""
    import torch.distributed.checkpoint as dcp

    found = adapted(case)
    spread: nn.Module = found
    if how == "ddp":
        spread = nn.parallel.DistributedDataParallel(found)
    elif how != "alone":
        peftcore.shard(found, adapter_placement=how)
    optimizer = optimizer_of(found)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    state = {"training": peftcore.TrainingState(spread, optimizer, scheduler=scheduler)}
    if begin:
        dcp.load(state, checkpoint_id=folder)
    losses = []
    for number in range(begin, end):
        tokens = torch.randint(3, 90, (6, 7), generator=torch.Generator().manual_seed(number))
        value = torch.tensor(step(spread, mine(tokens), optimizer))
        scheduler.step()
        distributed.all_reduce(value)
        losses.append(value.item() / ranks.count())
    dcp.save(state, checkpoint_id=folder)
    return losses


def resume_on_another_base(folder: str) -> str:
    import torch.distributed.checkpoint as dcp

    found = peftcore.apply(model(seed=5), "lora", **CASES["lora"][1])
    before = values(found)
    optimizer = optimizer_of(found)
    try:
        dcp.load({"training": peftcore.TrainingState(found, optimizer)}, checkpoint_id=folder)
    except Exception as error:
        assert farthest(values(found), before) == 0
        return str(error)
    return "nothing was raised"


def load_sharded(folder: str, quant_type: str | None) -> tuple[dict[str, Tensor], list[float], dict[str, int]]:
    """(whole base, losses of two steps, bytes held by this rank and in all)."""
    base = peftcore.load_sharded(folder, quant_type)
    whole = {name: sharded.whole(p.detach()).clone() for name, p in base.named_parameters()}
    parts = {id(p): p for p in base.parameters()}.values()
    held = {"here": sum(p.to_local().nbytes for p in parts), "all": sum(p.nbytes for p in parts)}
    torch.manual_seed(ranks.rank())  # the adapter starts differently on each rank, until it is given to all
    found = peftcore.shard(peftcore.apply(base, "lora", r=3).train())
    optimizer = optimizer_of(found)
    losses = [step(found, mine(), optimizer) for _ in range(2)]
    return whole, losses, held


def damaged(folder: str) -> str:
    try:
        peftcore.load_sharded(folder)
    except peftcore.CheckpointError as error:
        return str(error)
    return "nothing was raised"


def sharded_by_accelerate(cases: list[str]) -> dict[str, float]:
    """Largest difference of a gradient where accelerate's FSDP2 shards: its core, since it refuses to run on a CPU."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    warnings.simplefilter("ignore")
    found = {}
    for case in cases:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        accelerator = Accelerator(cpu=True)
        accelerator.state.fsdp_plugin = plugin
        alone, spread = adapted(case), adapted(case)
        if case in SHARED_BETWEEN_BLOCKS:
            with pytest.raises(peftcore.PeftcoreError, match=r"in several blocks, which accelerate's FSDP2"):
                refuse_between_blocks(spread)
            found[case] = 0.0
            continue
        refuse_between_blocks(spread)
        assert fsdp2_prepare_model(accelerator, spread) is spread
        backward_alone(alone)
        backward_here(spread, spread)
        found[case] = farthest(values(spread, "grad"), values(alone, "grad"))
    return found


def reference(how: str) -> tuple[float, float] | str:
    """How far outputs have moved in a step, and how far those of the reference are from the first ones."""
    found = adapted("lora")
    peftcore.shard(found, adapter_placement=how)
    optimizer = optimizer_of(found)
    step(found, mine(), optimizer)

    def outputs() -> Tensor:
        with torch.no_grad():
            return found(input_ids=TOKENS).logits

    before = outputs()
    try:
        kept = peftcore.reference_model(found)
    except peftcore.PeftcoreError as error:
        return str(error)
    step(found, mine(), optimizer)
    after = outputs()
    with torch.no_grad():
        again = kept(input_ids=TOKENS).logits
    return (after - before).abs().max().item(), (again - before).abs().max().item()
