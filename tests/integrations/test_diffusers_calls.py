"""diffusers' own calls for LoRA where PEFT is not installed."""

from __future__ import annotations

from pathlib import Path

import fresh_process
import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed (extra `test`)")

CODE = """
import sys
sys.modules["peft"] = None
sys.path.insert(0, sys.argv[1])
import peftcore, diffusers, torch, warnings
import pipelines
from peftcore.testing import disturb
from safetensors.torch import load_file

def equal(a, b): return all(torch.equal(a[name], b[name]) for name in a)
def outputs(pipe): return {name: pipelines.output(model) for name, model in pipelines.models(pipe).items()}
def refused(match, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except peftcore.PeftcoreError as error:
        assert match in str(error), error
    else:
        raise AssertionError(match)

folder = sys.argv[2]
trained = pipelines.pipeline("sd")
for i, model in enumerate(pipelines.models(trained).values()):
    peftcore.apply(model, "lora", r=2, lora_alpha=2, target_modules=pipelines.there(model, pipelines.ATTENTION))
    disturb(model, "default", seed=i)
peftcore.save(trained.components, folder, format="diffusers")
wanted = outputs(trained)

pipe = pipelines.pipeline("sd")
before = outputs(pipe)
refused("no adapter is loaded in unet, text_encoder", pipe.set_adapters, "style")
pipe.load_lora_weights(folder, adapter_name="style")
assert equal(outputs(pipe), wanted) and not equal(outputs(pipe), before)
assert pipe.get_list_adapters() == {"unet": ["style"], "text_encoder": ["style"]}
pipe.load_lora_weights(folder, weight_name=pipelines.FILE)
assert pipe.get_active_adapters() == ["default_1"] and equal(outputs(pipe), wanted)
pipe.load_lora_weights(load_file(folder + "/" + pipelines.FILE), adapter_name="memory")
assert equal(outputs(pipe), wanted)
pipe.delete_adapters(["default_1", "memory"])
pipe.set_adapters("style", 0.0)
assert all(torch.allclose(outputs(pipe)[name], before[name], atol=1e-6) for name in before)
pipe.set_adapters(["style"], [{"unet": 1.0, "text_encoder": 0.0}])
assert torch.equal(outputs(pipe)["unet"], wanted["unet"])
assert not torch.equal(outputs(pipe)["text_encoder"], wanted["text_encoder"])
refused("no adapter ['other'] is loaded", pipe.set_adapters, "other")
refused("2 names and 1 weights", pipe.set_adapters, ["style", "style"], [1.0])
refused("set_adapters got weights for ['unett'], but", pipe.set_adapters, "style", {"unett": 0.5})
refused("takes a number for each component", pipe.set_adapters, "style", {"unet": {"down": 1.0}})
pipe.set_adapters("style")
pipe.disable_lora()
assert equal(outputs(pipe), before)
pipe.enable_lora()
assert equal(outputs(pipe), wanted)
refused("lora_scale=0.5", pipe.fuse_lora, lora_scale=0.5)
refused("has no component ['vae']", pipe.fuse_lora, components=["vae"])
weights = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in pipelines.models(pipe).items()}
pipe.fuse_lora()
assert all(torch.allclose(outputs(pipe)[name], wanted[name], atol=1e-4) for name in wanted)
pipe.unfuse_lora()
assert equal(outputs(pipe), wanted)
pipe.fuse_lora()
fused = outputs(pipe)
pipe.unload_lora_weights()  # merged: stays in the weights
assert all(torch.allclose(outputs(pipe)[name], fused[name], atol=1e-5) for name in fused)
assert pipe.get_list_adapters() == {}
other = pipelines.pipeline("sd")
other.load_lora_weights(folder)
other.unload_lora_weights()
assert equal(outputs(other), before) and other.get_list_adapters() == {}
for name, model in pipelines.models(trained).items():  # on disk in one model, in memory in the other
    peftcore.save(model, folder + "/" + name)
    peftcore.load(getattr(other, name), folder + "/" + name, adapter="kept", resident=name != "unet")
assert other.get_list_adapters() == {"unet": ["kept"], "text_encoder": ["kept"]}
other.set_adapters("kept")
assert equal(outputs(other), wanted)
other.delete_adapters("kept")
assert other.get_list_adapters() == {}
print("done")
"""


def test_where_peft_is_not_installed(tmp_path: Path) -> None:
    done = fresh_process.run(CODE, str(Path(__file__).parent.parent), str(tmp_path))
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-2000:]
