// y = x Wᵀ + bias of few rows of x, W dense and read once, as it lies: what each SIMD level supplies.
//
// PyTorch's products of bf16 read W at half the speed of memory there: 131 MB, an output head, take 6.7 ms on two cores
// of Zen 4.
#pragma once

#include "common/half.h"
#include "common/integers.h"

namespace peftcore {
namespace gemm {

struct FewRows {
    const BFloat16* x;  // [batch, inner]
    int64_t batch, inner;
    const BFloat16* w;  // [columns, inner]
    int64_t columns;
    const BFloat16* bias = nullptr;
    BFloat16* y;  // [batch, columns], rounded once
};

struct FewRowsKernel {
    int64_t max_batch = 0;  // rows of x up to which it is faster than the library
    void (*run)(const FewRows&, Range columns) = nullptr;
};

void fill_avx512bf16(FewRowsKernel&);

}  // namespace gemm
}  // namespace peftcore
