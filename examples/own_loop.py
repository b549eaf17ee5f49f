"""A plain PyTorch training loop: python examples/own_loop.py MODEL TEXTS.jsonl OUTPUT"""

import json
import math
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
optimizer = torch.optim.AdamW(peftcore.parameter_groups(model, lr=2e-3))
epochs, batch_size = 2, 4
total_steps = epochs * math.ceil(len(texts) / batch_size)
step = 0

for epoch in range(epochs):
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(texts[start : start + batch_size], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        (loss + peftcore.extra_loss(model)).backward()  # the method's loss term, 0 for LoRA
        optimizer.step()
        step += 1
        peftcore.after_step(model, step, total_steps, optimizer=optimizer)  # before gradients are cleared
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.4f}")

peftcore.save(model, output)  # adapter_config.json and adapter_model.safetensors
