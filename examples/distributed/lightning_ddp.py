"""Lightning's DDP: python examples/distributed/lightning_ddp.py MODEL TEXTS.jsonl OUTPUT (starts the ranks itself)"""

import json
import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftcore


class Tuned(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model, self.strict_loading = model, False  # checkpoints contain only the adapter

    def training_step(self, batch):
        return self.model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=2e-3)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


source, data, output = sys.argv[1:]
read = AutoTokenizer.from_pretrained(source)
texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
loader = DataLoader(texts, batch_size=2, collate_fn=lambda rows: read(rows, return_tensors="pt", padding=True))
saved = ModelCheckpoint(output, every_n_train_steps=1, save_last=True)
trainer = lightning.Trainer(devices=2, strategy="ddp", max_epochs=1, callbacks=[saved], default_root_dir=output)
tuned = Tuned(peftcore.apply(AutoModelForCausalLM.from_pretrained(source), "lora", r=8).train())
trainer.fit(tuned, loader, ckpt_path="last")  # continues from OUTPUT/last.ckpt if it exists
peftcore.save(tuned.model, f"{output}/adapter")  # rank 0 writes
