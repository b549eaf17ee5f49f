"""Makes the folders beside this file with AdapterHub's library `adapters`; run in an environment of its own.

    pip install adapters==1.3.0 torch torchvision safetensors && python make.py

As plugins/peftcore-adapter/tests/adapterhub/make.py, whose models they are of; outputs also of a padded batch.
"""

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("models", HERE.parents[2] / "peftcore-adapter/tests/adapterhub/make.py")
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def main():
    import adapters
    from adapters import DiReftConfig, LoReftConfig, NoReftConfig

    for make, name, config in (
        (models.bert, "loreft", LoReftConfig(r=2)),
        (models.llama, "loreft", LoReftConfig(r=3, prefix_positions=2, suffix_positions=1, layers=[1])),
        (models.llama, "loreft_tied", LoReftConfig(prefix_positions=1, suffix_positions=2, tied_weights=True)),
        (models.llama, "noreft", NoReftConfig(r=2, non_linearity="relu", suffix_positions=1)),
        (models.bert, "direft", DiReftConfig(r=2, suffix_positions=1)),
    ):
        model = models.filled(make())
        torch.manual_seed(0)
        adapters.init(model)
        model.add_adapter("task", config=config)
        model.set_active_adapters("task")
        models.moved(model, "task", std=0.5)
        with torch.no_grad():
            plain = model.eval()(**models.inputs(model))[0]
            padded = model(**models.inputs(model), attention_mask=MASK)[0]
        folder = HERE / f"{make.__name__}-{name}"
        model.save_adapter(str(folder), "task", use_safetensors=True, with_head=False)
        save_file({"output": plain.contiguous(), "padded": padded.contiguous()}, folder / "output.safetensors")


if __name__ == "__main__":
    main()
