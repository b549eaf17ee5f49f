"""Kinds of placements, one file per kind.

    placement       Placement, AtModule: what the core asks of a placement, and the answers of most kinds; Attachments
    around          Around      the adapter wraps a module
    after           After       the adapter follows a module
    on_weight       OnWeight    the adapter changes a parameter
    train           Train       parameters of the base are trained
    soft_prompt     SoftPrompt  vectors before the input
    prefix_kv       PrefixKV    keys and values in the cache

The modules are listed from the lowest up. A kind is a class that derives from `Placement`. The core calls its methods,
so plugins can add kinds without registering them (docs/plugins.md).
"""
