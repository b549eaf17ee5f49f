"""Ray Train, which replaces lost workers: python examples/distributed/ray_train.py MODEL TEXTS.jsonl OUTPUT"""

import json
import sys
from pathlib import Path

import ray.train.torch
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftcore


def work():
    torch.manual_seed(0)
    read = AutoTokenizer.from_pretrained(source)
    texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
    model = peftcore.apply(AutoModelForCausalLM.from_pretrained(source), "lora", r=8).train()
    spread = ray.train.torch.prepare_model(model)  # DDP copies rank 0's adapter to every rank
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    state = {"training": peftcore.TrainingState(model, optimizer), "step": torch.tensor(0)}
    if checkpoint := ray.train.get_checkpoint():  # the newest one, with the files of all workers
        dcp.load(state, checkpoint_id=checkpoint.to_directory())
    for step in range(int(state["step"]), len(texts) // 4):  # 4 texts per step for any number of workers
        batch = read(texts[4 * step + rank : 4 * step + 4 : world], return_tensors="pt", padding=True).to(model.device)
        spread(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dcp.save(state | {"step": torch.tensor(step + 1)}, checkpoint_id=f"{output}/worker {rank}")
        ray.train.report({}, ray.train.Checkpoint(f"{output}/worker {rank}"), delete_local_checkpoint_after_upload=True)
    peftcore.save(model, f"{output}/adapter")  # rank 0 writes


source, data, output = (str(Path(path).resolve()) for path in sys.argv[1:])
workers = ray.train.ScalingConfig(num_workers=2, use_gpu=torch.cuda.is_available())
run = ray.train.RunConfig(name="state", storage_path=output, failure_config=ray.train.FailureConfig(max_failures=3))
ray.train.torch.TorchTrainer(work, scaling_config=workers, run_config=run).fit()
