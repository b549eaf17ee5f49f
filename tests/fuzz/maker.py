"""Random tensors and weights in 4 bits, the parts of an operator's arguments."""

import math
import random

import torch
from fuzz.memory import LAYOUTS, laid_out

from peftcore import ops

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Maker:
    """Draws arguments; everything follows from the number of the call."""

    def __init__(self, number):
        self.random = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        self.choice = self.random.choice

    def size(self, most=70):
        return self.choice([1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 64, 65, self.random.randint(1, most)])

    def place(self, values, layouts=LAYOUTS):
        return laid_out(values, self.choice(layouts), self.random.random() < 0.8)

    def normal(self, *shape, dtype=torch.float32, layouts=LAYOUTS):
        return self.place(torch.randn(shape, generator=self.generator).to(dtype), layouts)

    def bytes(self, *shape):
        return self.place(torch.randint(256, shape, generator=self.generator, dtype=torch.uint8))

    def some(self, value):
        return value if self.random.random() < 0.5 else None

    def packed(self, *shape):
        """The two arguments of a weight in 4 bits."""
        kind = self.random.random()
        if 0.2 <= kind < 0.35:
            return self.affine(*shape)
        if kind < 0.2:  # MXFP4, also with rows that are not whole blocks
            shape = (*shape[:-1], -(-shape[-1] // 32) * 32 if self.random.random() < 0.9 else shape[-1])
            count = math.prod(shape)
            exponents = torch.randint(256, (-(-count // 32),), generator=self.generator)
            # 255 is NaN; sums with much larger ones would overflow in one order and not in another.
            scales = torch.where(exponents < 252, 112 + exponents % 20, 255).to(torch.uint8)
            weight = [self.bytes(-(-count // 2), 1), self.place(scales), self.place(ops.codebook("mxfp4"))]
            return {"weight": weight, "packing": [32, -1, *shape]}
        if 0.35 <= kind < 0.5:
            return self.small_blocks(*shape)
        blocksize, count = self.choice([32, 64, 64, 128]), math.prod(shape)
        blocks, nests = -(-count // blocksize), self.random.random() < 0.5
        weight = [self.bytes(-(-count // 2), 1)]
        weight += [self.bytes(blocks) if nests else self.normal(blocks).abs(), self.place(ops.NF4)]
        if nests:
            nested = -(-blocks // 32)
            weight += [self.normal(nested).abs(), self.place(ops.DYNAMIC8), torch.tensor(1.0)]
        return {"weight": weight, "packing": [blocksize, 32 if nests else 0, *shape]}

    def affine(self, *shape):
        """A weight in affine4, also with rows that are not whole groups."""
        blocksize = self.choice([32, 64, 128])
        shape = (*shape[:-1], -(-shape[-1] // blocksize) * blocksize if self.random.random() < 0.9 else shape[-1])
        blocks = -(-math.prod(shape) // blocksize)
        weight = [self.bytes(-(-math.prod(shape) // 2), 1), self.normal(blocks, dtype=self.choice(FLOATS))]
        weight.append(self.place(ops.codebook("affine4")))
        if self.random.random() < 0.8:
            zeros = torch.randint(17, (blocks,), generator=self.generator)
            weight.append(self.place(zeros.to(self.choice([torch.uint8, torch.float32]))))
        return {"weight": weight, "packing": [blocksize, -2, *shape]}

    def small_blocks(self, *shape):
        """A weight in NVFP4, also with rows that are not whole blocks, other scales of the whole and other tables."""
        shape = (*shape[:-1], -(-shape[-1] // 16) * 16 if self.random.random() < 0.9 else shape[-1])
        blocks = -(-math.prod(shape) // 16)
        least, end = self.choice([(8, 127), (8, 127), (0, 127), (0, 255)])  # normal, not negative, any but the last NaN
        scales = torch.randint(least, end, (blocks,), generator=self.generator, dtype=torch.uint8)
        weight = [self.bytes(-(-math.prod(shape) // 2), 1), self.place(scales), self.place(ops.codebook("nvfp4"))]
        outer = torch.rand(-(-blocks // 32), generator=self.generator) + 0.01
        weight.append(self.place(outer[:1].repeat(len(outer)) if self.random.random() < 0.7 else outer))
        is_e4m3 = self.random.random() < 0.8
        weight.append(self.place(ops.codebook("e4m3") / self.choice([1, 3]) if is_e4m3 else ops.DYNAMIC8))
        weight.append(torch.tensor(self.choice([0.0, 0.0, 0.5])))
        return {"weight": weight, "packing": [16, 32, *shape]}
