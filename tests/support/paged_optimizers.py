"""Paged optimizers over small pages."""

import torch
from torch import nn

from peftcore import optim

PAGE = 4096


def parameters(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(200 + 90 * i, generator=generator)) for i in range(count)]


def step(optimizer, params, number):
    generator = torch.Generator().manual_seed(number)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def paged(params, budget, kind=optim.PagedAdamW, **options):
    return kind(params, budget=budget, page_bytes=PAGE, **options)


def pages_of(optimizer):
    """How many it has."""
    return sum(pages.pages for pages in optimizer._pages.values())
