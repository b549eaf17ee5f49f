"""DDP: accelerate launch --num_processes 2 [--cpu] examples/accelerate_ddp.py MODEL TEXTS.jsonl OUTPUT"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftcore

source, data, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
accelerator = Accelerator()

torch.manual_seed(0)  # the same adapter on every rank
model = AutoModelForCausalLM.from_pretrained(source)
peftcore.apply(model, "lora", r=8).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
loader = DataLoader(texts, batch_size=4, collate_fn=lambda rows: tokenizer(rows, return_tensors="pt", padding=True))
spread, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for batch in loader:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = spread(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()

accelerator.print(f"loss {loss.item():.4f}")
peftcore.save(model, output)  # rank 0 writes
accelerator.end_training()
peftcore.parallel.finish()
