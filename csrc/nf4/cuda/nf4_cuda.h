// Launchers of the 4-bit CUDA kernels. Pointers are device memory but for the views themselves, `stream` a
// cudaStream_t, dtypes peftcore::Dtype. They return nullptr, or why the launch failed. Arguments are checked by
// the caller (weight/weight.h).
#pragma once

#include <cstdint>

#include "weight/view.h"

extern "C" {

const char* peftcore_nf4_quantize(const void* x, int dtype, const float* quant_map, int64_t count,
                                  int blocksize, uint8_t* codes, float* absmax, void* stream);

// Scales to 8 bits around *offset, the nearest of 256 sorted entries.
const char* peftcore_nf4_quantize_absmax(const float* absmax, const float* quant_map, const float* offset,
                                         int64_t count, int blocksize, uint8_t* codes, float* nested_absmax,
                                         void* stream);

const char* peftcore_nf4_dequantize(const peftcore::WeightView* weight, void* out, int dtype, void* stream);

// y [batch, rows] = x [batch, columns] Wᵀ + bias + thin factorᵀ, x, bias (or nullptr) and y of `dtype`, thin
// [batch, rank] and factor [rows, rank] fp32. Rank 0: without the last two. At most kLinearMaxBatch rows of
// x.
const char* peftcore_nf4_linear(const void* x, int dtype, int batch, const peftcore::WeightView* weight,
                                const void* bias, const float* thin, const float* factor, int rank, void* y,
                                void* stream);
}

namespace peftcore {
namespace nf4 {

// An estimate, not measured: every 16 rows of W read all of x, from L2. At 64 rows that is 16 times the bytes
// of W in 4 bits, and takes about as long as unpacking W to memory and reading it again.
constexpr int kLinearMaxBatch = 64;

}  // namespace nf4
}  // namespace peftcore
