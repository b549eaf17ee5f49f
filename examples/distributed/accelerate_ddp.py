"""DDP: accelerate launch --num_processes 2 [--cpu] examples/distributed/accelerate_ddp.py MODEL TEXTS.jsonl OUTPUT"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftcore

source, data, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
accelerator = Accelerator(split_batches=True)  # 4 texts per step for any number of ranks

torch.manual_seed(0)  # the same adapter on every rank
model = AutoModelForCausalLM.from_pretrained(source)
peftcore.apply(model, "lora", r=8).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
loader = DataLoader(texts, batch_size=4, collate_fn=lambda rows: tokenizer(rows, return_tensors="pt", padding=True))
spread, optimizer, loader = accelerator.prepare(model, optimizer, loader)
state = {"training": peftcore.TrainingState(model, optimizer.optimizer)}

done = max((int(file.parent.name) for file in Path(output, "state").glob("*/.metadata")), default=0)
if done:  # a checkpoint of any number of ranks; `.metadata` is written last
    dcp.load(state, checkpoint_id=f"{output}/state/{done}")
for step, batch in enumerate(accelerator.skip_first_batches(loader, done), done + 1):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    accelerator.backward(spread(**batch, labels=labels).loss)
    optimizer.step()
    optimizer.zero_grad()
    dcp.save(state, checkpoint_id=f"{output}/state/{step}")
peftcore.save(model, f"{output}/adapter")  # rank 0 writes
accelerator.end_training()
peftcore.distributed.finish()
