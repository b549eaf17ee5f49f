"""What a training step costs with each method, beside Hugging Face PEFT's and the frozen model, in one run.

    python benchmarks/methods.py [--threads 2] [--seconds 20] [--layers 30] [--methods lora dora vera ia3 adalora ...]

Every linear layer but the head is adapted, by the same config in both libraries; base in bf16, adapters in fp32. Rows
are timed in turn and keep the memory that they free. The floor is the frozen model: forward, and the gradients of all
that is computed. AdaLoRA's step is its whole: the term of the loss, importance and allocation. Peak memory is that of a
process of its own, of two steps.
"""

import argparse
import json
import logging
import warnings

import engine
import measure
import torch

import peftcore

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
STEPS = 10_000  # of AdaLoRA's schedule, in whose middle every step allocates
FIELDS = {
    "lora": {"r": 16, "lora_alpha": 16},
    "dora": {"r": 16, "lora_alpha": 16},
    "vera": {"r": 256},
    "ia3": {},
    "adalora": {"init_r": 16, "target_r": 8, "total_step": STEPS},
    "ln-tuning": {},
    "loha": {"r": 8, "alpha": 8},
    "lokr": {"r": 16, "alpha": 16},
    "oft": {"oft_block_size": 32},
    "boft": {"boft_block_size": 4},
    "hra": {"r": 8},
    "miss": {"r": 64},
    "road": {"group_size": 64},
    "fourierft": {"n_frequency": 1000},
    "c3a": {"block_size": 64},
    "delora": {"r": 16},
    "psoft": {"r": 32},
    "waveft": {"n_frequency": 1000},
    "supertuning": {"sparsity": 0.99},
    "glora": {"r": 8},
}
PEERS = {
    "lora": ("LoraConfig", {}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "vera": ("VeraConfig", {}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "adalora": ("AdaLoraConfig", {}),
    "ln-tuning": ("LNTuningConfig", {}),
    "loha": ("LoHaConfig", {}),
    "lokr": ("LoKrConfig", {}),
    "oft": ("OFTConfig", {}),
    "boft": ("BOFTConfig", {}),
    "hra": ("HRAConfig", {}),
    "miss": ("MissConfig", {}),
    "road": ("RoadConfig", {}),
    "fourierft": ("FourierFTConfig", {}),
    "c3a": ("C3AConfig", {}),
    "delora": ("DeloraConfig", {}),
    "psoft": ("PsoftConfig", {}),
    "waveft": ("WaveFTConfig", {}),
    "supertuning": ("SupertuningConfig", {}),
    "glora": ("GloraConfig", {}),
}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(library, method, model):
    model.train()
    if library == "peftcore":
        return peftcore.apply(model, method, **FIELDS[method])
    import peft

    name, fields = PEERS[method]
    targets = {} if method == "ln-tuning" else {"target_modules": LAYERS}
    config = getattr(peft, name)(task_type="CAUSAL_LM", **targets, **FIELDS[method], **fields)
    return peft.get_peft_model(model, config)


def stepper(kind, layers):
    """A training step of engine.py's model; `kind` is `frozen`, or a library and a method."""
    torch.manual_seed(0)
    model = engine.llama(layers)
    tokens = torch.randint(0, 49152, (engine.BATCH, engine.LENGTH), generator=torch.Generator().manual_seed(1))
    if kind == "frozen":
        model = engine.with_adapter("frozen", model)
        return lambda: model(input_ids=tokens, labels=tokens).loss.backward()
    library, method = kind.split()
    model = adapted(library, method, model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    done = 0

    def step():
        nonlocal done
        done += 1
        loss = model(input_ids=tokens, labels=tokens).loss
        if library == "peftcore":
            loss = loss + peftcore.extra_loss(model)
        loss.backward()
        optimizer.step()
        if library == "peftcore":
            peftcore.after_step(model, done, STEPS)
        elif method == "adalora":
            model.base_model.update_and_allocate(done)
        optimizer.zero_grad()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20, help="for each method, with its peer and the frozen model")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--methods", nargs="+", choices=FIELDS, default=list(FIELDS))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        step = stepper(options.peak, options.layers)
        measure.reset_peak()
        for _ in range(2):
            step()
        print(json.dumps({"peak": measure.peak_megabytes()}))
        return
    measure.print_surroundings(options.threads)
    measure.keep_freed_memory()
    print(f"a step, {options.layers} layers of a 135M Llama, bf16, batch {engine.BATCH} x {engine.LENGTH}")
    print(f"{'':20}{'min, ms':>10}{'median':>9}{'IQR':>7}   of frozen: min, median{'peak, MB':>14}")
    for method in options.methods:
        kinds = ("frozen", f"peftcore {method}", f"peft {method}")
        times = measure.interleaved({kind: stepper(kind, options.layers) for kind in kinds}, options.seconds)
        floor = measure.spread(times["frozen"])
        for kind in kinds:
            low, median, width = measure.spread(times[kind])
            arguments = ("--peak", kind, "--threads", options.threads, "--layers", options.layers)
            peak = measure.in_child(__file__, *arguments)["peak"]
            of = f"{low / floor[0]:18.3f}{median / floor[1]:8.3f}"
            print(f"{kind:20}{low:10.1f}{median:9.1f}{width:7.1f}{of}{peak:14.0f}", flush=True)


if __name__ == "__main__":
    main()
