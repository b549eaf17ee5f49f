"""Makes the folders beside this file with AdapterHub's library `adapters`; run in an environment of its own.

    pip install adapters==1.3.0 torch torchvision safetensors && python make.py

Of the models of plugins/peftcore-adapter/tests/adapterhub/make.py with two adapters, `a` and `b`: their folders, that
of their fusion, and `outputs.safetensors`, the model's first output with each composition. And `mam`: its bottleneck's
folder, and of the whole the first output and the prefix `[n, 2 · layers · heads · head_dim]`.
"""

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("models", HERE.parents[2] / "peftcore-adapter/tests/adapterhub/make.py")
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)


def mam():
    import adapters
    from adapters import MAMConfig, ParBnConfig, PrefixTuningConfig

    config = MAMConfig(PrefixTuningConfig(prefix_length=3, bottleneck_size=5), ParBnConfig(reduction_factor=4))
    model = models.filled(models.bert())
    torch.manual_seed(0)
    adapters.init(model)
    model.add_adapter("mam", config=config)
    models.moved(model, "mam")
    model.set_active_adapters("mam")
    with torch.no_grad():
        output = model.eval()(**models.inputs(model))[0].contiguous()
    model.eject_prefix_tuning("mam")
    [prefix] = [p.detach() for name, p in model.named_parameters() if name.endswith("control_trans")]
    model.add_adapter("ffn", config=config.adapter)
    trained = {name.replace(".mam.", ".ffn."): p for name, p in model.state_dict().items() if ".mam." in name}
    model.load_state_dict(trained, strict=False)
    folder = HERE / "mam"
    folder.mkdir(exist_ok=True)
    model.save_adapter(str(folder / "ffn"), "ffn", use_safetensors=True, with_head=False)
    save_file({"output": output, "prefix": prefix.view(3, -1).contiguous()}, folder / "outputs.safetensors")


def main():
    import adapters
    from adapters import DoubleSeqBnConfig, SeqBnConfig
    from adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack

    for make, name, config in (
        (models.bert, "seq_bn", SeqBnConfig(reduction_factor=4)),
        (models.bert, "double_seq_bn", DoubleSeqBnConfig(reduction_factor=4)),
        (models.llama, "seq_bn", SeqBnConfig(reduction_factor=4)),
    ):
        model = models.filled(make())
        torch.manual_seed(0)
        adapters.init(model)
        folder, outputs = HERE / f"{make.__name__}-{name}", {}
        folder.mkdir(exist_ok=True)
        for seed, adapter in enumerate("ab"):
            model.add_adapter(adapter, config=config)
            models.moved(model, adapter, seed)
            model.save_adapter(str(folder / adapter), adapter, use_safetensors=True, with_head=False)
        model.add_adapter_fusion(["a", "b"], "dynamic")
        models.moved(model, "a,b")
        model.save_adapter_fusion(str(folder / "fusion"), ["a", "b"], use_safetensors=True)
        # Of n adapters the library gives the n-th part of their average: it divides by n twice.
        average = Average("a", "b", weights=[1.4, 0.6], normalize_weights=False)
        for what, setup in {
            "stack": Stack("a", "b"),
            "stack_back": Stack("b", "a"),
            "fuse": Fuse("a", "b"),
            "split": Split("a", "b", splits=[4, 2]),
            "parallel": Parallel("a", "b"),
            "batch_split": BatchSplit("b", "a", batch_sizes=[1, 1]),
            "average": average,
        }.items():
            model.set_active_adapters(setup)
            with torch.no_grad():
                outputs[what] = model.eval()(**models.inputs(model))[0].contiguous()
        save_file(outputs, folder / "outputs.safetensors")


if __name__ == "__main__":
    main()
    mam()
