"""DDP: torchrun --nproc-per-node 2 --max-restarts 3 examples/distributed/torchrun_ddp.py MODEL TEXTS.jsonl OUTPUT"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftcore

source, data, output = sys.argv[1:]
peftcore.distributed.start()  # init_process_group() would wait forever after a restart
rank, world = distributed.get_rank(), distributed.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(source)
texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]

model = AutoModelForCausalLM.from_pretrained(source).to(device)
peftcore.apply(model, "lora", r=8).train()
spread = torch.nn.parallel.DistributedDataParallel(model)  # copies rank 0's adapter to every rank
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
state = {"training": peftcore.TrainingState(model, optimizer)}

done = max((int(file.parent.name) for file in Path(output, "state").glob("*/.metadata")), default=0)
if done:  # a checkpoint of any number of ranks; `.metadata` is written last
    dcp.load(state, checkpoint_id=f"{output}/state/{done}")
for step in range(done, len(texts) // 4):  # 4 texts per step for any number of ranks
    batch = tokenizer(texts[4 * step + rank : 4 * step + 4 : world], return_tensors="pt", padding=True).to(device)
    spread(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dcp.save(state, checkpoint_id=f"{output}/state/{step + 1}")
peftcore.save(model, f"{output}/adapter")  # rank 0 writes
peftcore.distributed.finish()
