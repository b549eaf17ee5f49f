"""Does a model of 7 billion parameters take a QLoRA training step in 8 GB of memory, on a CPU?

    python benchmarks/qlora_7b.py [--layers 32] [--length 128] [--steps 1] [--threads 2]

Llama-2-7B's shape (32 layers, hidden 4096, 32,000 tokens) with random weights, drawn and quantized one decoder layer
after the other, so the dense model never exists. LoRA r=16 on every linear layer, bf16, gradient checkpointing, fused
AdamW; embedding, output head and norms stay dense in bf16. The peak is that of the whole process, from its start.
It takes a minute and a half.
"""

import argparse
import logging
import time
import warnings

import measure
import torch

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")

LIMIT_MB = 8000
R = 16


def say(text):
    print(f"{text}; memory at most {measure.peak_megabytes():,.0f} MB so far", flush=True)


def decoder_layer(config, index):
    """A layer with weights of N(0, 0.02²), its linear ones in 4 bits."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    import peftcore

    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, index)
    layer = layer.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=0.02) if weight.dim() == 2 else weight.fill_(1)
    return peftcore.quantize(layer, "nf4")


def llama(layers):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=0, use_cache=False)  # the other sizes are those of 7B
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    say("embedding and head made")
    for index in range(layers):
        model.model.layers.append(decoder_layer(config, index))
        if (index + 1) % 8 == 0 or index + 1 == layers:
            say(f"{index + 1} of {layers} layers made and quantized")
    config.num_hidden_layers = layers
    return model


def sizes(model):
    """(parameters, bytes) of the base: in 4 bits, and in all."""
    from peftcore.quantization import quantized_layers

    layers = [layer for _, layer in quantized_layers(model)]
    scales = [(layer.absmax, layer.nested_absmax) for layer in layers]
    four = (
        sum(layer.in_features * layer.out_features for layer in layers),
        sum(layer.weight.nbytes for layer in layers) + sum(t.nbytes for pair in scales for t in pair),
    )
    dense = [p for p in model.parameters() if p.is_floating_point()]
    return four, (four[0] + sum(p.numel() for p in dense), four[1] + sum(p.nbytes for p in dense))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"PyTorch {torch.__version__}, {options.threads} threads")
    import peftcore

    start = time.perf_counter()
    model = llama(options.layers)
    made = time.perf_counter() - start
    (weights, quantized), (base, total) = sizes(model)
    peftcore.apply(model, "qlora", r=R, lora_alpha=R)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    print(f"base: {base / 1e9:.2f} billion parameters, made in {made:.0f} s, {total / 1e6:,.0f} MB")
    print(f"  {8 * quantized / weights:.4f} bits a parameter in 4-bit layers ({weights / 1e9:.2f} billion), ", end="")
    print(f"{8 * total / base:.2f} over all")
    say(f"LoRA: {sum(p.numel() for p in trained) / 1e6:.1f} million parameters")
    tokens = torch.randint(0, model.config.vocab_size, (1, options.length))
    for _ in range(options.steps):
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        forward = time.perf_counter() - start
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        took = time.perf_counter() - start
        say(f"step of {options.length} tokens: {took:.1f} s (forward {forward:.1f} s), loss {loss.item():.3f}")
    peak = measure.peak_megabytes()
    print(f"peak {peak:,.0f} MB: {'within' if peak <= LIMIT_MB else 'ABOVE'} {LIMIT_MB:,} MB")


if __name__ == "__main__":
    main()
