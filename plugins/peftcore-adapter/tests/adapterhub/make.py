"""Makes the folders beside this file with AdapterHub's library `adapters`; run in an environment of its own.

    pip install adapters==1.3.0 torch safetensors && python make.py

Each holds what `save_adapter` wrote, and `output.safetensors`: the first output of the model with that adapter.
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


def filled(model):
    """The same weights in every release: each parameter is drawn from a seed made of its name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(model):
    call = {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        call["decoder_input_ids"] = TOKENS[:, :4]
    return call


def main():
    import adapters
    from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig

    for make, name, config in (
        (bert, "seq_bn", SeqBnConfig(reduction_factor=4)),
        (bert, "par_bn", ParBnConfig(reduction_factor=4)),
        (distilbert, "double_seq_bn", DoubleSeqBnConfig(reduction_factor=4)),
        (llama, "seq_bn", SeqBnConfig(reduction_factor=4, leave_out=[0])),
        (t5, "double_seq_bn", DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True)),
    ):
        model = filled(make())
        torch.manual_seed(0)
        adapters.init(model)
        model.add_adapter("task", config=config)
        model.set_active_adapters("task")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".task." in key:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            output = model.eval()(**inputs(model))[0]
        folder = Path(__file__).parent / f"{make.__name__}-{name}"
        model.save_adapter(str(folder), "task", use_safetensors=True, with_head=False)
        save_file({"output": output.contiguous()}, folder / "output.safetensors")


if __name__ == "__main__":
    main()
