// A slab is a part of a 4-bit weight [rows, columns], dequantized into a buffer that each thread keeps between calls.
#pragma once

#include <ATen/core/Tensor.h>

#include "weight/view.h"

namespace peftcore {
namespace quant4 {

// The BLAS library multiplies slabs where tiles (quant4/cpu/tiles) do not support the shape, dtype or level.
//
// Measured with 4096 x 4096 in bf16 and 32 MB of L3 cache. With few rows of x, slabs of 4 MiB stay in the cache. With
// 1024 rows the library's product with slabs, which are narrow, is slower than with the whole weight: 1.5 times the
// dense product with 4 MiB, 1.09 with 16 and 1.06 with 32. The gradient is always slower: with 256 rows 1.06 to 1.07
// with 32 MiB, 1.07 to 1.09 with less. Writing slabs past the cache is slower at every size. Sizes are fixed, whatever
// the caches of a machine, as the library's sums may depend on a slab's size.
constexpr int64_t kSlabBytes = int64_t(4) << 20, kLargeSlabBytes = int64_t(32) << 20;
constexpr int64_t kSmallSlabRows = 256;
// Slabs of columns are a multiple of this, so that a segment of a row is whole blocks or pieces of larger blocks.
constexpr int64_t kSlabColumns = 64;

// W[rows, columns] as a contiguous tensor in the workspace, each value rounded once.
at::Tensor dequantized_slab(const WeightView& weight, Range rows, Range columns,
                            const at::TensorOptions& options);

}  // namespace quant4
}  // namespace peftcore
