"""Soft prompts and prefixes as adapters around the backbone: embeddings, mask, token types, positions and cache.

    SoftPrompt      p_1 … p_n  x_1 … x_m   before the first layer      mask  1 … 1  mask
    PrefixKV        k_1 … k_n  k(x_1) …    in every layer's attention  positions of x: n, n + 1, …

Both are inserted at prefill only, while the cache is empty. In later calls the cache contains them, and only the mask
and given positions are extended. A soft prompt is removed from the backbone's output, so labels, losses and heads are
not affected. The loss is over the same tokens as without a prompt: the first input token, which the prompt's last
vector predicts, is not included. Several may be active: soft prompts are placed in order of activation, `[first, …,
last, tokens]`; prefixes have the same order in the cache, before the soft prompts.

The package imports `adaptation` for layers under tensor parallelism. Placements call `place_soft_prompt`
(soft_prompt.py) and `place_prefix` (prefix.py). Plugins use `TokenCounter` (token_counter.py), and read the call of a
backbone with backbone.py.
"""
