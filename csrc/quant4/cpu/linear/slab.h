// Part of a packed weight [rows, columns], dequantized into memory that each thread keeps between calls.
#pragma once

#include <ATen/core/Tensor.h>

#include "weight/view.h"

namespace peftcore {
namespace quant4 {

// For what tiles (quant4/cpu/tiles) do not read, and for dtypes and levels without them: then the library
// multiplies.
//
// Measured with 4096 x 4096 in bf16 and 32 MB of third-level cache. Few rows of x: slabs of 4 MiB stay in
// the cache. With 1024 rows the library's product is slower by slabs, which are narrow for it, than by the
// whole weight: 1.5 times dense by 4 MiB, 1.09 by 16 and 1.06 by 32. So it is in the gradient always: with
// 256 rows 1.06 to 1.07 by 32 MiB, 1.07 to 1.09 by less. Writing slabs around the cache is slower at every
// size. The same on every machine, whatever its caches: the library may divide its sums by a slab's size.
constexpr int64_t kSlabBytes = int64_t(4) << 20, kLargeSlabBytes = int64_t(32) << 20;
constexpr int64_t kSmallSlabRows = 256;
// Slabs of columns are a multiple of this, so that a segment of a row is whole blocks or pieces of larger
// ones.
constexpr int64_t kSlabColumns = 64;

// W[rows, columns] as a contiguous tensor in the workspace, each value rounded once.
at::Tensor dequantized_slab(const WeightView& weight, Range rows, Range columns,
                            const at::TensorOptions& options);

}  // namespace quant4
}  // namespace peftcore
