"""TRL's SFTTrainer: python examples/sft.py MODEL TEXTS.jsonl OUTPUT"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import peftcore

source, data, output = sys.argv[1:]
rows = Dataset.from_list([json.loads(line) for line in Path(data).read_text().splitlines()])

model = AutoModelForCausalLM.from_pretrained(source)
peftcore.apply(model, "lora", r=8)

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(output, max_steps=4, save_steps=2, max_length=64, learning_rate=2e-3, bf16=False, report_to="none"),
    train_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained(source),
)
trainer.train()
trainer.save_model(f"{output}/adapter")
