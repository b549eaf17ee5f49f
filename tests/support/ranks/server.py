"""Imports that the server of `processes` does before it forks ranks and workers of the census.

It finds the plugins, too, and leaves what is alive out of later garbage collections, of which accelerate asks for
one in every training: 0.3 s each.
"""

import gc

import census.check
import census.instances  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp  # noqa: F401
import transformers.generation.utils
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401

import peftcore.distributed
import peftcore.testing
from support.ranks import work  # noqa: F401

peftcore.methods()
gc.collect()
gc.freeze()
