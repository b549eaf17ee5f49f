"""A training loop of one's own: python examples/own_loop.py MODEL TEXTS.jsonl OUTPUT"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftcore

source, data, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]

model = AutoModelForCausalLM.from_pretrained(source)
peftcore.apply(model, "lora", r=8, target_modules="all-linear").train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)

for epoch in range(2):
    for start in range(0, len(texts), 4):
        batch = tokenizer(texts[start : start + 4], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.4f}")

peftcore.save(model, output)  # adapter_config.json and adapter_model.safetensors
