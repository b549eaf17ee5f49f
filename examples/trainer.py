"""transformers' Trainer: python examples/trainer.py MODEL TEXTS.jsonl OUTPUT (or torchrun ... for DDP)"""

import json
import sys
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import peftcore
from peftcore.training import latest_checkpoint

source, data, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
rows = [{"input_ids": tokenizer(json.loads(line)["text"])["input_ids"]} for line in Path(data).read_text().splitlines()]

model = AutoModelForCausalLM.from_pretrained(source)
peftcore.apply(model, "lora", r=8)

arguments = TrainingArguments(
    output, max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=2e-3, report_to="none"
)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train(resume_from_checkpoint=latest_checkpoint(output))  # the newest complete checkpoint, or None
trainer.save_model(f"{output}/adapter")
