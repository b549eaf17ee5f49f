"""Makes the folders beside this file with AdapterHub's library `adapters`; run in an environment of its own.

    pip install adapters==1.3.0 torch torchvision safetensors && python make.py

Each holds what `save_adapter` wrote, and `output.safetensors`: the first output of the model with that adapter.
`NAME-SOMETHING` is of the model that the function NAME makes.
"""

import zlib
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

TOKENS = torch.arange(3, 15).reshape(2, 6)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert():
    return transformers.BertModel(transformers.BertConfig(vocab_size=32, max_position_embeddings=16, **SIZES))


def distilbert():
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 16}
    return transformers.DistilBertModel(transformers.DistilBertConfig(vocab_size=32, **sizes))


def llama():
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=1, tie_word_embeddings=False, **SIZES)
    return transformers.LlamaForCausalLM(config)


def t5():
    sizes = {"d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    config = transformers.T5Config(vocab_size=32, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config)


def classifier():
    config = transformers.BertConfig(vocab_size=32, max_position_embeddings=16, **SIZES)
    return transformers.BertForSequenceClassification(config)


def masked():
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=32, max_position_embeddings=16, **SIZES))


def vit():
    return transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **SIZES))


VIT = {"attention.attention.": "attention.", "attention.output.dense": "attention.o_proj", "output.dense": "mlp.fc2"}
VIT |= {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "intermediate.dense": "mlp.fc1",
    "encoder.layer.": "layers.",
}


def filled(model):
    """The same weights in every release: each parameter is drawn from a seed made of its name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for older, today in VIT.items() if model.config.model_type == "vit" else ():
                name = name.replace(older, today)
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(model):
    if model.config.model_type == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)}
    call = {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        call["decoder_input_ids"] = TOKENS[:, :4]
    return call


def with_flexible_head(model):
    """`model`, a BertForMaskedLM, as a class of the library, in which an invertible adapter has its inverse."""
    from adapters import AutoAdapterModel

    flexible = AutoAdapterModel.from_config(model.config)
    flexible.add_masked_lm_head("head")
    flexible.bert.load_state_dict(model.bert.state_dict(), strict=False)
    transform, parts = model.cls.predictions.transform, flexible.heads["head"]
    for part, of in (
        (parts[0], transform.dense),
        (parts[2], transform.LayerNorm),
        (parts[3], model.cls.predictions.decoder),
    ):
        part.load_state_dict(of.state_dict())
    return flexible


def moved(model, name, seed=0, std=0.2):
    """Draw anew what the adapter `name` trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                noise = std * torch.randn(parameter.shape, generator=generator)
                if key.endswith("original"):  # of a matrix with orthonormal rows: its diagonal holds signs
                    noise.fill_diagonal_(0.0)
                parameter.add_(noise)


def main():
    import adapters
    from adapters import (
        AdapterPlusConfig,
        CompacterConfig,
        CompacterPlusPlusConfig,
        DoubleSeqBnConfig,
        ParBnConfig,
        SeqBnConfig,
        SeqBnInvConfig,
    )

    rank = {"factorized_phm_rule": True, "shared_phm_rule": False, "phm_rank": 2, "phm_bias": False}
    for make, name, config in (
        (bert, "seq_bn", SeqBnConfig(reduction_factor=4)),
        (bert, "par_bn", ParBnConfig(reduction_factor=4)),
        (distilbert, "double_seq_bn", DoubleSeqBnConfig(reduction_factor=4)),
        (llama, "seq_bn", SeqBnConfig(reduction_factor=4, leave_out=[0])),
        (t5, "double_seq_bn", DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True)),
        (bert, "normed", DoubleSeqBnConfig(reduction_factor=4, ln_after=True, scaling="learned")),
        (bert, "gated", SeqBnConfig(reduction_factor=4, use_gating=True)),
        (bert, "par_gated", ParBnConfig(reduction_factor=4, use_gating=True)),
        (classifier, "compacter", CompacterConfig(reduction_factor=4)),
        (llama, "compacter++", CompacterPlusPlusConfig(reduction_factor=4)),
        (llama, "compacter++shared", CompacterPlusPlusConfig(reduction_factor=4, shared_W_phm=True, learn_phm=False)),
        (bert, "compacter_ranks", CompacterConfig(reduction_factor=2, **rank)),
        (bert, "compacter_whole", CompacterConfig(reduction_factor=4, shared_phm_rule=False, factorized_phm_W=False)),
        (vit, "adapter_plus", AdapterPlusConfig(reduction_factor=4)),
        (bert, "adapter_plus", AdapterPlusConfig(reduction_factor=4)),
        (t5, "adapter_plus", AdapterPlusConfig(reduction_factor=4)),
        (bert, "seq_bn_inv", SeqBnInvConfig(reduction_factor=4)),
        (llama, "seq_bn_inv", SeqBnInvConfig(reduction_factor=4)),
        (masked, "seq_bn_inv", SeqBnInvConfig(reduction_factor=4)),
        (masked, "seq_bn_inv_flexible", SeqBnInvConfig(reduction_factor=4)),
    ):
        model = filled(make())
        torch.manual_seed(0)
        if name.endswith("flexible"):
            model = with_flexible_head(model)
        else:
            adapters.init(model)
        model.add_adapter("task", config=config)
        model.set_active_adapters("task")
        moved(model, "task", std=1.0 if name == "compacter_ranks" else 0.2)
        with torch.no_grad():
            output = model.eval()(**inputs(model))[0]
        folder = Path(__file__).parent / f"{make.__name__}-{name}"
        model.save_adapter(str(folder), "task", use_safetensors=True, with_head=False)
        save_file({"output": output.contiguous()}, folder / "output.safetensors")


if __name__ == "__main__":
    main()
