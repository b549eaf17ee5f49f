"""Memory and time that a QLoRA training step of a large model takes on a CPU.

    python benchmarks/qlora_large.py [llama-7b|qwen3-30b-a3b|gpt-oss-20b] [--layers N] [--length 128] [--steps 1]
                                     [--threads 2] [--quant-type nf4|mxfp4] [--logits] [--in-backward] [--profile]

The model's shape with random weights, drawn and quantized one decoder layer after the other, so the dense model never
exists. LoRA on every linear layer and, of less rank, on every expert, bf16, gradient checkpointing; embedding, output
head, routers and norms stay dense in bf16. The loss is computed without logits (`--logits` makes them). The peak is
that of the whole process, from its start, of which PyTorch, transformers and peftcore take "imports". What the step
takes next to them, base and adapters is listed: gradients, the optimizer's state, and the rest, activations and
temporary memory. With `--in-backward` a parameter is updated and its gradient freed as soon as the gradient is
complete, so that there are never more than a layer's gradients.

gpt-oss in mxfp4 is as it is published: its experts are in 4 bits, attention is dense in bf16.
"file" is the size of all base tensors, which is that of the published files.

    llama-7b         6.7 billion parameters; LoRA r=16; fused AdamW
    qwen3-30b-a3b    30.5 billion, 48 layers of 128 experts, 8 a token; r=16 and 2 on experts; PagedAdamW8bit
    gpt-oss-20b      20.9 billion, 24 layers of 32 experts, 4 a token; r=16 and 4 on experts; the same
"""

import argparse
import importlib
import logging
import time
import warnings
from dataclasses import dataclass, field
from functools import partial

import measure
import torch

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")

R = 16


@dataclass
class Shape:
    """Shape of a model: transformers' modules, fields of their config that are not defaults, and the limit in MB."""

    module: str  # of transformers.models
    prefix: str  # of its classes
    limit: int
    layers: int
    config: dict = field(default_factory=dict)
    expert_r: int | None = None


SHAPES = {
    "llama-7b": Shape("llama", "Llama", 8_000, 32),
    "qwen3-30b-a3b": Shape(
        "qwen3_moe",
        "Qwen3Moe",
        20_000,
        48,
        {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
        },
        expert_r=2,
    ),
    "gpt-oss-20b": Shape(
        "gpt_oss", "GptOss", 15_000, 24, {"num_hidden_layers": 24, "num_local_experts": 32}, expert_r=4
    ),
}


def say(text):
    print(f"{text}; memory at most {measure.peak_megabytes():,.0f} MB so far", flush=True)


def decoder_layer(kind, config, index, quant_type):
    """Return a layer with weights of N(0, 0.02²), its linear layers and experts in 4 bits."""
    import peftcore

    with torch.device("meta"):
        layer = kind(config, index).to(torch.bfloat16)
    for module in layer.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                module._parameters[name] = torch.nn.Parameter(torch.empty_like(weight, device="cpu"))
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if not weight.is_floating_point():
                continue
            if "bias" in name or "sinks" in name:
                weight.zero_()
            else:
                weight.normal_(std=0.02) if weight.dim() > 1 else weight.fill_(1)
    # gpt-oss is published with dense attention.
    skip = ["self_attn"] if quant_type == "mxfp4" and config.model_type == "gpt_oss" else None
    return peftcore.quantize(layer, quant_type, skip=skip)


def made(shape, layers, quant_type):
    from transformers import AutoConfig

    config = AutoConfig.for_model(shape.module, **shape.config)
    kinds = config.layer_types if hasattr(config, "layer_types") else None
    config.num_hidden_layers, config.use_cache = 0, False
    modeling = importlib.import_module(f"transformers.models.{shape.module}.modeling_{shape.module}")
    torch.set_default_dtype(torch.bfloat16)
    model = getattr(modeling, f"{shape.prefix}ForCausalLM")(config)
    torch.set_default_dtype(torch.float32)
    say("embedding and head made")
    if kinds is not None:
        config.layer_types = kinds
    for index in range(layers):
        kind = getattr(modeling, f"{shape.prefix}DecoderLayer")
        model.model.layers.append(decoder_layer(kind, config, index, quant_type))
        if (index + 1) % 8 == 0 or index + 1 == layers:
            say(f"{index + 1} of {layers} layers made and quantized")
    config.num_hidden_layers = layers
    return model


def complete(trained, optimizer, in_backward, largest, _):
    """Note the bytes of all gradients as one is complete, and with `in_backward` update its parameter and free it."""
    largest[0] = max(largest[0], sum(p.grad.nbytes for p in trained if p.grad is not None))
    if in_backward:
        optimizer.step()
        optimizer.zero_grad()


def state_bytes(optimizer):
    """Return the bytes of the optimizer's state in memory."""
    if hasattr(optimizer, "paging"):
        return optimizer.paging().resident
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quant-type", choices=["nf4", "mxfp4"], default="nf4")
    parser.add_argument("--logits", action="store_true", help="make the logits for the loss")
    parser.add_argument(
        "--in-backward", action="store_true", help="update each parameter when its gradient is complete"
    )
    parser.add_argument("--profile", action="store_true", help="another step, and where its time goes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    measure.print_surroundings(options.threads)
    import peftcore
    from peftcore.optim import PagedAdamW8bit

    shape = SHAPES[options.shape]
    importlib.import_module(f"transformers.models.{shape.module}.modeling_{shape.module}")
    imports = measure.peak_megabytes()
    start = time.perf_counter()
    model = made(shape, options.layers or shape.layers, options.quant_type)
    took = time.perf_counter() - start
    rank = {} if shape.expert_r is None else {"expert_r": shape.expert_r}
    file = sum(t.nbytes for t in model.state_dict().values())
    peftcore.apply(model, "lora", r=R, lora_alpha=R, **rank)
    if not options.logits:
        peftcore.loss_without_logits(model)
    print(f"base made in {took:.0f} s; file {file / 1e6:,.0f} MB")
    print(peftcore.summary(model))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    trained = [p for p in model.train().parameters() if p.requires_grad]
    experts = shape.expert_r is not None
    optimizer = PagedAdamW8bit(trained, lr=1e-4) if experts else torch.optim.AdamW(trained, lr=1e-4, fused=True)
    say(f"LoRA: {sum(p.numel() for p in trained) / 1e6:.1f} million parameters")
    largest = [0]  # bytes of gradients at a time
    for p in trained:
        p.register_post_accumulate_grad_hook(partial(complete, trained, optimizer, options.in_backward, largest))
    tokens = torch.randint(0, model.config.vocab_size, (1, options.length))

    def step():
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        forward = time.perf_counter() - start
        loss.backward()
        backward = time.perf_counter() - start - forward
        if not options.in_backward:
            optimizer.step()
            optimizer.zero_grad()
        took = time.perf_counter() - start
        parts = f"forward {forward:.1f} s, backward {backward:.1f} s, optimizer {took - forward - backward:.1f} s"
        say(f"step of {options.length} tokens: {took:.1f} s ({parts}), loss {loss.item():.3f}")

    for _ in range(options.steps):
        step()
    peak = measure.peak_megabytes()
    print(f"peak {peak:,.0f} MB: {'within' if peak <= shape.limit else 'ABOVE'} {shape.limit:,} MB")
    adapters = sum(p.nbytes for p in trained)
    state = state_bytes(optimizer)
    rest = peak * 1e6 - imports * 1e6 - file - adapters - largest[0] - state
    print(
        f"imports {imports:,.0f} MB, file {file / 1e6:,.0f} MB, adapters {adapters / 1e6:,.1f} MB: in all "
        f"{imports + (file + adapters) / 1e6:,.0f} MB; gradients {largest[0] / 1e6:,.1f} MB, optimizer "
        f"{state / 1e6:,.1f} MB, rest of the step {rest / 1e6:,.0f} MB"
    )
    if options.profile:
        with torch.profiler.profile() as profile:
            step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=48))


if __name__ == "__main__":
    main()
