// Kernels of each SIMD level. A range of blocks is one task of a thread.
#pragma once

#include <cstdint>

#include "quant4/format.h"
#include "weight/view.h"

namespace peftcore {
namespace quant4 {

struct QuantizeCall {
    const void* x;  // `count` values, contiguous
    Dtype dtype;
    int64_t count;
    int64_t blocksize;
    Codebook book;
    uint8_t* codes;
    void* absmax;  // of the format's `Scale`
};

struct DequantizeCall {
    WeightView weight;
    Dtype dtype;
    void* out;    // its values, contiguous
    bool stream;  // bypass the cache
};

struct Kernels {
    void (*quantize)(const QuantizeCall&, int64_t first_block, int64_t last_block) = nullptr;
    void (*quantize_powers)(const QuantizeCall&, int64_t first_block, int64_t last_block) = nullptr;  // MXFP4
    void (*dequantize)(const DequantizeCall&, int64_t first_block, int64_t last_block) = nullptr;
};

void fill_portable(Kernels&);
void fill_avx2(Kernels&);
void fill_avx512(Kernels&);
void fill_neon(Kernels&);

}  // namespace quant4
}  // namespace peftcore
