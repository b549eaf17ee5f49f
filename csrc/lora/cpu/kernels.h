// The three low-rank products, for x of one dtype at one SIMD level. LoRA's A [r, in] projects down to the rank, its B
// [out, r] up again, so `down` and `up` name the products with A and B. A thin matrix is [rows, r]. Factors, thin matrices
// and sums are fp32.
//
//   down     s = c (keep ∘ x) right              [M, r]
//   up       y += keep ∘ (left right)            [M, columns], rounded once
//   outer    sums += leftᵀ (keep ∘ x)            [r, columns]
//
// SIMD levels broadcast a value of the left factor and multiply it by a vector of the right factor's columns. AMX tiles
// multiply bf16, so each fp32 factor is split into two bf16 values, which keep 16 of its 24 bits (x is bf16 and loses
// nothing): dA and dB then have an error of 3.5e-6, instead of 2e-3 with a single bf16 value.
//
// Where csrc/gemm computes the product with the frozen weight, s is appended as additional columns of K (frozen.h): a
// separate `up` would take a third of that product's time with AMX, and a tenth with bf16 dot products. Elsewhere `up`
// adds to the BLAS library's result.
//
// `outer` is the slowest, because tiles need x rearranged into pairs across rows.
#pragma once

#include <cstdint>

#include "common/dropout.h"
#include "common/dtype.h"
#include "gemm/cpu/product.h"

namespace peftcore {
namespace lora {

using gemm::Mask;

// Layout in which `down` and `outer` read a factor: [ceil(inner / pair)][width] units of `pair` values along the inner
// dimension, the missing ones zero.
struct Arrangement {
    int pair, unit_size;  // bytes
    // from[i * inner_stride + j * outer_stride], i < inner, j < outer; one of the strides is 1
    void (*arrange)(const float* from, int64_t inner_stride, int64_t outer_stride, int64_t inner,
                    int64_t outer, int64_t width, void* out);
};

struct DownArgs {
    const void* x;  // [M, columns]
    int64_t columns;
    const void* right;  // [columns][width], arranged
    int64_t width, r;
    float factor;
    Mask keep;
    float* s;  // [M, r]
};

struct UpArgs {
    void* y;  // [M, columns]
    int64_t columns;
    const float* left;  // [M, inner]
    int64_t inner;
    const float* right;  // [inner, width]
    int64_t width;
    Mask keep;
};

struct OuterArgs {
    const void* x;  // [M, columns]
    int64_t columns;
    const void* left;  // [M][width], arranged
    int64_t width, r;
    Mask keep;
    bool cached;                        // x's rows were read just before
    int64_t first_column, last_column;  // multiples of kColumnGrain, or the end
    // [width][last_column - first_column, filled up to kColumnGrain], to which the products are added
    float* sums;
};

// An fp32 matrix split into bf16 halves: the rounded value (`first`) and the rounded remainder (`rest`). With two parts,
// these are written as they are. With three parts, a single sum over the inner dimension of
//   [first, rest, first] [first, first, rest]ᵀ
// holds all terms of a product of two matrices but the smallest. Part p of row i begins at
//   out + i * row_stride + p * part_stride
struct Halves {
    const float* from;  // [rows, columns]
    int64_t rows, columns;
    int parts;
    bool left;  // of three
    int64_t row_stride, part_stride;
    BFloat16* out;
};

struct ThinKernels {
    Arrangement arrangement;
    Arrangement plain;  // [inner][width] fp32, of `up`
    // As in dropout.h.
    void (*keep_bytes)(const Dropout&, int64_t row, int64_t first, int64_t count, uint8_t* out);
    void (*down)(const DownArgs&, int64_t first_row, int64_t last_row);
    void (*up)(const UpArgs&, int64_t first_row, int64_t last_row);
    void (*outer)(const OuterArgs&, int64_t first_row, int64_t last_row);  // first: multiple of kRowGrain
    void (*halves)(const Halves&) = nullptr;                               // of the factors of a gemm::Addend
};

constexpr int64_t kRowPadding = 16;  // values that RowKernels may write past the end of `to` or `out`

// Kernels for a single row of fp32, indexed by the dtype of the memory that they read or write (see rows.h).
struct RowKernels {
    void (*widen)(const void* from, int64_t count, float* to);
    void (*add)(const float* from, int64_t count, void* to);
    void (*multiply)(const float* x, const void* factor, int64_t inner, int64_t outer, float* out);
};

constexpr int kWidthMultiple = 16;  // of `width`
constexpr int kColumnGrain = 32, kRowGrain = 64;

// Kernels of a level; arrays are indexed by Dtype.
struct Kernels {
    ThinKernels thin[kDtypes];
    RowKernels row[kDtypes];
};

void fill_avx512bf16(ThinKernels&);  // of bf16
void fill_amx(Kernels&);

}  // namespace lora
}  // namespace peftcore
