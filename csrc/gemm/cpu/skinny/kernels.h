// Skinny products, y = x Wᵀ + bias for few rows of x, with a dense W that is read once, in place: the kernels of each
// SIMD level.
//
// PyTorch's products of bf16 read W at half the speed of memory: 131 MB, an output head, take 6.7 ms on two cores of
// Zen 4. Without instructions for 16 bits, each row of x takes as long as reading W.
#pragma once

#include "common/dtype.h"
#include "common/half.h"
#include "common/integers.h"

namespace peftcore {
namespace gemm {

struct SkinnyProduct {
    const void* x;  // [batch, inner]
    int64_t batch, inner;
    const void* w;  // [columns, inner]
    int64_t columns;
    const void* bias = nullptr;
    void* y;  // [batch, columns], rounded once
};

// Kernel for tensors of one dtype.
struct SkinnyKernel {
    int64_t max_batch = 0;  // rows of x up to which this is fastest
    void (*run)(const SkinnyProduct&, Range columns) = nullptr;
};

void fill_avx2(SkinnyKernel (&)[kDtypes]);  // for fp16 and bf16
void fill_avx512bf16(SkinnyKernel&);

}  // namespace gemm
}  // namespace peftcore
