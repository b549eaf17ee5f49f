// What each SIMD level supplies. A range of blocks is one task of a thread.
#pragma once

#include <cstdint>

#include "common/cpu_features.h"
#include "nf4/nf4.h"

namespace peftcore {
namespace nf4 {

struct QuantizeArgs {
    const void* x;  // `count` values, contiguous
    Dtype dtype;
    int64_t count;
    int64_t blocksize;
    Codebook book;
    uint8_t* packed;
    float* absmax;
};

struct DequantizeArgs {
    const uint8_t* packed;
    Scales scales;
    float code[16];
    int64_t count;
    int64_t blocksize;
    Dtype dtype;
    void* out;    // `count` values, contiguous
    bool stream;  // write around the cache
};

struct Kernels {
    void (*quantize)(const QuantizeArgs&, int64_t first_block, int64_t last_block);
    void (*dequantize)(const DequantizeArgs&, int64_t first_block, int64_t last_block);
};

Kernels portable_kernels();
Kernels avx2_kernels();
Kernels avx512_kernels();

}  // namespace nf4
}  // namespace peftcore
