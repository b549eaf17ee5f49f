"""The files of adapters, in Hugging Face PEFT's format: reading, writing, and what they mean for a model.

The modules from the lowest up; each may import those above it in this list.

    safe_reading      bytes, JSON and safetensors of files that nobody vouches for, with limits
    folder            an adapter folder as one save left it, and the manifest that names its files
    atomic_writing    the adapters of one save, all or none, also if the process is killed
    metadata          what peftcore writes into the metadata of tensors
    peft_fields       fields of an `adapter_config.json`: which method reads them, its config, PEFT's defaults
    peft_configs      config objects of PEFT, which `apply` takes

    vocabulary, fingerprint, multiplier, written_config, tensors    parts of the files of an adapter on a model
    single_file, reading, fitting                                   files without a config; content; whether it fits
    lost_ranks                                                      which rank has ended while others wait for it
    model_card                                                      README.md, with the metadata that hubs read
    hub, saving, loading                                            `save`, `load`, `restore`

The first six are below `peftcore.engine`, the others above it, so this module imports none of them.

adapter_config.json, adapter_model.safetensors            an adapter
NAME/adapter_config.json, NAME/adapter_model.safetensors  further ones
peftcore_manifest.json                                    the hashes of all files of one save

A save is there when its manifest is there, by one rename: a process that is killed at any point leaves what was there
before, or all that is new. A reader takes only what the manifest names. Folders without one, as PEFT writes them, are
read as they are.
"""
