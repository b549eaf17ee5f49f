"""LoRA of a whole diffusion pipeline in one file, in the formats of diffusers and kohya-ss/sd-scripts.

diffusers    unet.PATH.lora_A.weight, text_encoder.PATH.lora_linear_layer.down.weight, ...; alpha in the header
kohya        lora_unet_PATH.lora_down.weight, .lora_up.weight, .alpha, with _ for each dot; Flux with its original names

Both convert from and to the LoRA of single layers (`layer_changes.py`). `parts.py` finds which part of a pipeline a
model is.
"""

from peftcore_lora.pipelines import diffusers_file, kohya_file

FILES = (diffusers_file.FORMAT, kohya_file.FORMAT)

__all__ = ["FILES"]
