"""FSDP2 with a 4-bit base: torchrun --nproc-per-node 2 examples/distributed/fsdp2_qlora.py MODEL TEXTS.jsonl OUTPUT"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from transformers import AutoTokenizer

import peftcore

source, data, output = sys.argv[1:]
peftcore.distributed.start()
rank, world = distributed.get_rank(), distributed.get_world_size()
if torch.cuda.is_available():
    torch.cuda.set_device(rank % torch.cuda.device_count())
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(source)
texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
texts = texts[: len(texts) // (2 * world) * 2 * world][rank::world]  # the same number of steps on every rank

model = peftcore.load_sharded(source, "nf4")  # no rank loads the whole model
peftcore.apply(model, "lora", r=8)
peftcore.shard(model)  # copies rank 0's adapter to every rank
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)

for start in range(0, len(texts), 2):
    batch = tokenizer(texts[start : start + 2], return_tensors="pt", padding=True).to(device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

dcp.save({"training": peftcore.TrainingState(model, optimizer)}, checkpoint_id=f"{output}/state")  # any number of ranks
peftcore.save(model, f"{output}/adapter")
peftcore.distributed.finish()
