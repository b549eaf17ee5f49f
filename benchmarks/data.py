"""Processor time and memory of the first two steps on a large CSV file, next to TRL with the `datasets` library.

    OMP_NUM_THREADS=1 python benchmarks/data.py MODEL [--rows 500000]

MODEL is the folder of a causal language model. Every row of the table is a process of its own that reads the CSV (texts
of 18 words), loads the model, adds LoRA to all linear layers and trains for two steps of four texts. peftcore's command
line also evaluates on four texts before and after, and writes samples and a report. TRL's cache of data sets starts
empty, as it does when a file is new.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he"]
LENGTH, BATCH, STEPS = 128, 4, 2


def write_csv(path, rows):
    """Write a CSV file with the column "text". Each row starts with its number, so that no text occurs twice."""
    generator = random.Random(0)
    with path.open("w") as file:
        file.write("text\n")
        for i in range(rows):
            file.write(f"{i} {' '.join(generator.choices(WORDS, k=18))}\n")


def train_with_trl(model, data, folder, streaming):
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    options = {"max_length": LENGTH, "per_device_train_batch_size": BATCH, "max_steps": STEPS, "use_cpu": True}
    texts = load_dataset("csv", data_files=data, split="train", cache_dir=f"{folder}/cache", streaming=streaming)
    SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16"),
        args=SFTConfig(folder, **options, bf16=False, report_to=[], save_strategy="no"),
        train_dataset=texts,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    ).train()


def commands(model, data, folder):
    """Return the command of each row of the table."""
    peftcore = [sys.executable, "-m", "peftcore_cli", "train", "--model", model, "--data", data, "--method", "lora"]
    peftcore += ["--output", f"{folder}/run", "--overwrite", "--dtype", "bf16", "--holdout", "4"]
    peftcore += ["--steps", str(STEPS), "--batch-size", str(BATCH), "--max-length", str(LENGTH)]
    trl = [sys.executable, __file__, model, "--trl", data, f"{folder}/trl"]
    return {
        "TRL": [*trl, "map"],
        "peftcore": peftcore,
        "TRL, streaming=True": [*trl, "stream"],
        "peftcore, --streaming": [*peftcore, "--streaming"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--trl", nargs=3, metavar=("DATA", "FOLDER", "HOW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl:
        data, folder, how = options.trl
        train_with_trl(options.model, data, folder, how == "stream")
        return

    print("| | processor time, s | peak memory, MB |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "text.csv"
        write_csv(data, options.rows)
        for name, command in commands(options.model, str(data), folder).items():
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
                errors = process.stderr.read()
                # wait4 returns this child's own peak, which RUSAGE_CHILDREN would give only as the largest of all.
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = status
            if status:
                sys.exit(errors)
            print(f"| {name} | {usage.ru_utime + usage.ru_stime:.0f} | {usage.ru_maxrss / 1024:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
