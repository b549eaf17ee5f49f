"""The files of adapters, in Hugging Face PEFT's format: reading, writing, and what they mean for a model.

It imports `engine` and what is below it. Public names: `peftcore.save`, `load`, `state_dict`, `set_state_dict`.
"""
