"""DeepSpeed's ZeRO-3: torchrun --nproc-per-node 2 examples/distributed/deepspeed_zero3.py MODEL TEXTS.jsonl OUTPUT"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

import peftcore

source, data, output = sys.argv[1:]
config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True}
deepspeed.init_distributed()
rank, world = distributed.get_rank(), distributed.get_world_size()
tokenizer = AutoTokenizer.from_pretrained(source)
texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]

partitions = HfDeepSpeedConfig(config)  # keep it alive: from_pretrained then partitions the base
model = AutoModelForCausalLM.from_pretrained(source)
peftcore.apply(model, "lora", r=8).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
if Path(output, "state", "latest").exists():  # needs the same number of ranks
    engine.load_checkpoint(f"{output}/state", load_module_strict=False)  # it does not contain the base

for step in range(engine.global_steps, len(texts) // (2 * world)):
    mine = texts[2 * world * step + rank : 2 * world * (step + 1) : world]
    batch = tokenizer(mine, return_tensors="pt", padding=True).to(engine.device)
    engine.backward(engine(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss)
    engine.step()
    engine.save_checkpoint(f"{output}/state", exclude_frozen_parameters=True)
peftcore.save(model, f"{output}/adapter")  # call it on every rank; rank 0 writes
distributed.destroy_process_group()
