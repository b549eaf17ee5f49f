"""The files of adapters, in Hugging Face PEFT's format: reading, writing, and what they mean for a model.

The modules from the lowest up; each may import those above it in this list.

    safe_reading      bytes, JSON and safetensors of files that nobody vouches for, with limits
    folder            an adapter folder, read as one save left it, and written whole or not at all
    metadata          what peftcore writes into the metadata of tensors
    peft_fields       fields of an `adapter_config.json`: which method reads them, its config, PEFT's defaults
    peft_configs      config objects of PEFT, which `apply` takes

    vocabulary, fingerprint, multiplier, written_config, tensors    parts of the files of an adapter on a model
    single_file, reading, fitting                                   files without a config; content; whether it fits
    model_card                                                      README.md, with the metadata that hubs read
    hub, saving, loading                                            `save`, `load`, `restore`

The first five are below `peftcore.engine`, the others above it, so this module imports none of them.
"""
