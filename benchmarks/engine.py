"""Cost of an adapter over the frozen model: a call, a step, peak memory, and applying it; peft in the same run.

    python benchmarks/engine.py [--threads 2] [--seconds 20] [--layers 30]

The model has the shape of SmolLM2-135M (30 layers, hidden 576, 9 heads of which 3 hold keys, 49,152 tokens) and random
weights; batch 4 x 128, r=16 on every linear layer, no dropout. "frozen" computes the gradient of its input and trains
nothing. Floor of a step: the products' operations (forward and the input's gradient) over the rate of a large product
measured in the same run.
"""

import argparse
import logging
import time
import warnings

import measure
import torch

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")

R = 16
BATCH, LENGTH = 4, 128


def llama(layers=30, dtype=torch.bfloat16, vocabulary=49152):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": vocabulary}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).train()
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def with_adapter(kind, model):
    """Return the model as library `kind` trains it."""
    if kind == "peftcore":
        import peftcore

        return peftcore.apply(model, "lora", r=R, lora_alpha=R)
    if kind == "peft":
        import peft

        config = peft.LoraConfig(r=R, lora_alpha=R, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)
    model.enable_input_require_grads()
    return model


def stepper(kind, model):
    """Return a training step: forward, backward, and AdamW where there is something to train."""
    model = with_adapter(kind, model)
    tokens = torch.randint(0, 49152, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def step():
        model(input_ids=tokens, labels=tokens).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def calls(seconds):
    """Time of one call of a 16 x 16 layer: what the wrapper itself costs."""
    import peft

    import peftcore

    x = torch.randn(1, 16)
    layers = {
        kind: torch.nn.Sequential(torch.nn.Linear(16, 16)).requires_grad_(False)
        for kind in ("linear", "peftcore", "resting", "peft")
    }
    peftcore.apply(layers["peftcore"], "lora", r=R, target_modules=["0"])
    peftcore.apply(layers["resting"], "lora", r=R, target_modules=["0"])
    peftcore.activate(layers["resting"], [])
    peft.inject_adapter_in_model(peft.LoraConfig(r=R, target_modules=["0"]), layers["peft"])

    def many(layer):
        def call():
            for _ in range(500):
                layer(x)

        return call

    with torch.no_grad():
        times = measure.interleaved({kind: many(layer[0]) for kind, layer in layers.items()}, seconds)
    base = measure.spread(times["linear"])[1] * 2  # microseconds a call
    print("\na call of a 16 x 16 layer, without gradients (µs)\n" + " " * 22 + "median      IQR   over the linear")
    for kind, row in times.items():
        _, median, iqr = measure.spread(row)
        print(f"{kind:18}{median * 2:10.1f}{iqr * 2:9.1f}{median * 2 - base:14.1f}")
    measure.note_pairs("a call of a 16 x 16 layer", times)


def steps(layers, seconds):
    """Time of a training step, interleaved, and the peak memory of each in a process of its own."""
    kinds = ("frozen", "peftcore", "peft")
    times = measure.interleaved({kind: stepper(kind, llama(layers)) for kind in kinds}, seconds)
    of = ("--threads", torch.get_num_threads(), "--layers", layers, "--peak")
    peaks = {kind: measure.in_child(__file__, *of, kind) for kind in kinds}
    base = measure.spread(times["frozen"])[1]
    print(f"\na training step, {layers} layers of SmolLM2-135M's shape, bf16, batch {BATCH} x {LENGTH} (ms)")
    print(f"{'floor':12}{floor(layers):7.0f}")
    print(" " * 16 + "min   median      IQR   to frozen   peak MB")
    for kind, row in times.items():
        low, median, iqr = measure.spread(row)
        print(f"{kind:12}{low:7.0f}{median:9.0f}{iqr:9.0f}{median / base:11.3f}{peaks[kind]['peak']:11.0f}")
    measure.note_pairs("a training step", times)
    measure.note_pairs("peak memory of a step", {kind: [found["peak"]] for kind, found in peaks.items()})


def floor(layers):
    """Return the ms that the frozen products of a step take."""
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    return measure.floor_of_step(llama(layers), {"input_ids": tokens}, measure.product_rate(torch.bfloat16))


def applying():
    """Time to apply to 32 layers, 224 linear layers."""
    print("\napplying r=16 to 32 layers, 224 linear layers (ms)")
    times = {"peftcore": [], "peft": []}
    for _ in range(7):
        for kind, row in times.items():
            model = llama(layers=32)
            start = time.perf_counter()
            with_adapter(kind, model)
            row.append((time.perf_counter() - start) * 1e3)
    for kind, row in times.items():
        low, median, iqr = measure.spread(row)
        print(f"{kind:12}min {low:6.0f}   median {median:6.0f}   IQR {iqr:5.0f}")
    measure.note_pairs("applying to 32 layers", times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--layers", type=int, default=30, help="of the model of a step")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        measure.print_peak(stepper(options.peak, llama(options.layers)))
        return
    measure.print_surroundings(options.threads)
    calls(options.seconds / 8)
    applying()
    steps(options.layers, options.seconds)


if __name__ == "__main__":
    main()
