// The three thin products, for one dtype at one SIMD level. Each is rows of a left factor, broadcast, times a
// right factor whose columns lie in vectors; sums are fp32.
//
//   down     s = c (keep ∘ x) right              [M, r], rounded once
//   up       y += keep ∘ (left right)            [M, columns], rounded once
//   outer    sums += leftᵀ (keep ∘ x)            [r, columns] fp32
//
// A factor is kept in units: one value in fp32, or with dot products of bf16 a pair of neighbours along the
// summed dimension. `arrange` makes [ceil(inner / pair)][width] units, the missing ones zero.
//
// Where the base's product is the library's, which runs at the processor's rate, `up` adds to what it wrote.
// Measured on Zen 4 with 1024 rows, 576 -> 1536, r = 16, bf16, over the base alone: S Bᵀ first and the base
// added with beta = 1 takes 1.041, S as more columns of K 1.045 and a copy of W at each call, neither with
// `down` yet; `down` and `up` together 1.037. In the gradient the library's four thin products take 1.14,
// these 1.12. With AMX the base's product is csrc/gemm, and S comes to it as more columns of K (base.h): `up`
// would take as long as a third of the product.
//
// `outer` is what is slowest: x must be turned into pairs across rows.
#pragma once

#include <cstdint>

#include "gemm/cpu/product.h"
#include "lora/lora.h"
#include "nf4/nf4.h"

namespace peftcore {
namespace lora {

using gemm::Mask;
using nf4::Dtype;

struct DownArgs {
    const void* x;  // [M, columns]
    int64_t columns;
    const void* right;  // [columns][width] units
    int64_t width, r;
    float factor;
    Mask keep;
    void* s;  // [M, r]
};

struct UpArgs {
    void* y;  // [M, columns]
    int64_t columns;
    const void* left;  // unit (row, i) at row * left_row + i * left_inner
    int64_t left_row, left_inner, inner;
    const void* right;  // [inner][width] units
    int64_t width;
    Mask keep;
};

struct OuterArgs {
    const void* x;  // [M, columns]
    int64_t columns;
    const void* left;  // [M][width] units
    int64_t width, r;
    Mask keep;
    bool cached;                        // x's rows were read just before
    int64_t first_column, last_column;  // multiples of kColumnGrain, or the end
    // [width][last_column - first_column, filled up to kColumnGrain], to which the products are added
    float* sums;
};

struct Kernels {
    int pair;       // values of a unit
    int unit_size;  // bytes
    // from[i * inner_stride + j * outer_stride], i < inner, j < outer
    void (*arrange)(const void* from, int64_t inner_stride, int64_t outer_stride, int64_t inner,
                    int64_t outer, int64_t width, void* out);
    // As in dropout.h.
    void (*keep_bytes)(const Dropout&, int64_t row, int64_t first, int64_t count, uint8_t* out);
    void (*down)(const DownArgs&, int64_t first_row, int64_t last_row);
    void (*up)(const UpArgs&, int64_t first_row, int64_t last_row);
    void (*outer)(const OuterArgs&, int64_t first_row, int64_t last_row);  // first: multiple of kRowGrain
};

// For one row, fp32 in between; by the dtype of what they read (see rows.h). Buffers have room for 16 more.
struct RowKernels {
    void (*widen)(const void* from, int64_t count, float* to);
    void (*add)(const float* from, int64_t count, void* to);
    void (*multiply)(const float* x, const void* factor, int64_t inner, int64_t outer, float* out);
};

constexpr int kWidthMultiple = 16;  // of `width`
constexpr int kColumnGrain = 32, kRowGrain = 64;

Kernels portable_kernels(Dtype dtype);
Kernels avx2_kernels(Dtype dtype);
Kernels avx512_kernels(Dtype dtype);
Kernels avx512bf16_kernels();  // bf16
Kernels amx_kernels();         // bf16

RowKernels portable_row_kernels(Dtype dtype);
RowKernels avx2_row_kernels(Dtype dtype);
RowKernels avx512_row_kernels(Dtype dtype);

}  // namespace lora
}  // namespace peftcore
