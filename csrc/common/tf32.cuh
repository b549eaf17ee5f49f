// Products of fp32 on tensor cores: a value is split into two tf32 values, its upper 11 bits and the upper 11 bits of
// the remainder. A product with a 16-bit value loses nothing more; a product of two split values omits that of the
// remainders.
//
// Tensor cores truncate as they add, so that the errors of a long sum do not cancel: S would be off by 1e-4 at 14,336
// columns. The products of 16 columns are therefore added to zero, and their sum to `d` in fp32 registers, which round
// to nearest (add_to of common/tensor_core.cuh).
#pragma once

#include "common/half.h"
#include "common/tensor_core.cuh"

namespace peftcore {

struct Tf32Pieces {
    uint32_t first, rest;
};

static __device__ __forceinline__ Tf32Pieces tf32_pieces(float value) {
    const uint32_t first = float_bits(value) & 0xffffe000u;
    // The remainder of infinity is 0; that of a NaN is a NaN, since the upper bits alone may be infinity's.
    return {first, bits_float(first) == value ? 0 : float_bits(value - bits_float(first))};
}

// Operands of d[16 x 8] += a[16 x 16] b[16 x 8], the sum over 16 in any order. A lane has of `a` rows lane /
// 4 and 8 behind, of `b` column lane / 4, and of the sum's 16 numbers tf32_inner(i): as in operands of
// mma_m16n8k16.
static __device__ __forceinline__ int tf32_inner(int i) {
    return i / 2 * 8 + int(threadIdx.x) % 4 * 2 + i % 2;
}

struct Tf32Left {
    Tf32Pieces piece[4][2];  // [inner][row]
};
struct Tf32Right {
    Tf32Pieces piece[4];  // [inner]
};

// `a` is what mma_m16n8k16 takes.
template <typename T>
__device__ __forceinline__ void tf32_multiply(float (&d)[4], const uint32_t (&a)[4], const Tf32Right& b) {
    const auto value = [&](int word, int half) {
        return float_bits(to_float(T{uint16_t(a[word] >> 16 * half)}));
    };
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t left[4] = {value(i, 0), value(i + 1, 0), value(i, 1), value(i + 1, 1)};
        mma_m16n8k8(sum, left, {b.piece[i].rest, b.piece[i + 1].rest});
        mma_m16n8k8(sum, left, {b.piece[i].first, b.piece[i + 1].first});
    }
    add_to(d, sum);
}

__device__ __forceinline__ void tf32_multiply(float (&d)[4], const Tf32Left& a, const Tf32Right& b) {
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const Tf32Pieces(&even)[2] = a.piece[i], (&odd)[2] = a.piece[i + 1];
        const uint32_t first[4] = {even[0].first, even[1].first, odd[0].first, odd[1].first};
        const uint32_t rest[4] = {even[0].rest, even[1].rest, odd[0].rest, odd[1].rest};
        mma_m16n8k8(sum, first, {b.piece[i].rest, b.piece[i + 1].rest});
        mma_m16n8k8(sum, rest, {b.piece[i].first, b.piece[i + 1].first});
        mma_m16n8k8(sum, first, {b.piece[i].first, b.piece[i + 1].first});
    }
    add_to(d, sum);
}

}  // namespace peftcore
