// The three low-rank products, for x of one dtype at one SIMD level. A is [r, in], B [out, r]: LoRA's A projects down
// to the rank, B up from it, and `down` and `up` name the products with A and B everywhere in csrc. A thin matrix is
// [rows, r]. Factors, thin matrices and sums are fp32.
//
//   down     s = c (keep ∘ x) right              [M, r]
//   up       y += keep ∘ (left right)            [M, columns], rounded once
//   outer    sums += leftᵀ (keep ∘ x)            [r, columns]
//
// Each multiplies rows of a left factor, broadcast, by a right factor with columns in vectors; or AMX tiles. A tile
// multiplies bf16: there a factor's value is split into two bf16 values, which hold 16 bits of its 24; x is bf16 and
// loses nothing. The error of dA and dB is 3.5e-6 so, and 2e-3 with a single bf16 value.
//
// Where the base's product is that of csrc/gemm, it takes S as additional columns of K (frozen.h): with AMX `up` would
// take a third of the product's time, with dot products of bf16 a tenth. Elsewhere `up` adds to the library's result.
//
// `outer` is the slowest: for tiles, x must be rearranged into pairs across rows.
#pragma once

#include <array>
#include <cstdint>
#include <limits>

#include "common/dtype.h"
#include "gemm/cpu/product.h"
#include "lora/dropout.h"

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

// norms[i]: the norm of row i of x + left right.
struct NormArgs {
    const void* x;  // [M, columns]
    int64_t columns;
    const float* left;  // [M, inner]
    int64_t inner;
    const float* right;  // [inner][width], in the plain arrangement
    int64_t width;
    float* norms;  // [M]
};

// y = x ∘ g, with g one number per column.
struct ScaleArgs {
    const void* x;  // [M, columns]
    int64_t columns;
    const float* g;
    void* y;
};

struct ScaleBackwardArgs {
    const void *dy, *x;  // [M, columns]
    int64_t columns;
    const float* g;
    int64_t first_column, last_column;
    void* dx;     // dy ∘ g, or nullptr
    float* sums;  // dy ∘ x is added to them; columns padded to whole vectors; or nullptr
};

// act(g) ∘ u, act(x) = x / (1 + e^-p), p = linear x + cubic x³.
struct GateArgs {
    const void *gate, *up;  // [M, columns], rows `stride` values apart
    int64_t columns, stride;
    float linear = 1, cubic = 0;  // silu
    bool rounded = false;         // act(g) is rounded before the product
    void* y = nullptr;            // [M, columns]
    // Of the gradient:
    const void* dy = nullptr;               // [M, columns]
    void *dgate = nullptr, *dup = nullptr;  // as gate and up
};

// y = act(x), or with `dy` dx. act(x) = x Φ(x) with the normal distribution, or as in GateArgs. Ranges are of values.
struct ActivationArgs {
    const void* x;
    bool normal;
    float linear, cubic;
    void* y;
    const void* dy = nullptr;
};

// y = factor (keep ∘ x)
struct DropArgs {
    const void* x;  // [M, columns]
    int64_t columns;
    Dropout dropout;
    float factor;
    void* y;
};

// y = (x r) ∘ g with r = 1 / √(mean of x² + eps) of each row.
struct RmsNormArgs {
    const void* x;  // [M, columns]
    int64_t columns;
    const float* g;  // [columns], and zeros up to kNormPadding
    float eps;
    bool rounded;  // x r is rounded before the product
    void* y;
    float* scale;  // r [M]
};

struct RmsNormBackwardArgs {
    const void *dy, *x;  // [M, columns]
    int64_t columns;
    const float* g;
    const float* scale;
    bool rounded;
    void* dx;     // or nullptr
    float* sums;  // dy ∘ (x r) is added to them; columns filled up to kNormPadding; or nullptr
};

constexpr int64_t kNormPadding = 16;

// out_t: the sum over j of w[t, j] y[places[t, j]]
struct RowSumArgs {
    const void* y;  // [.., columns]
    int64_t columns;
    const float* weights;  // [tokens, k]; or nullptr: all are 1
    const int64_t* places;
    int64_t k;
    void* out;  // [tokens, columns]
    bool wide;  // out is fp32 and not of y's dtype
};

struct RowSumBackwardArgs {
    const void* grad;  // [tokens, columns]
    const void* y;     // [tokens k, columns], or nullptr
    int64_t columns;
    const float* weights;  // [tokens, k]
    const int64_t* order;  // of each row its pair (t, j), as t k + j
    int64_t k;
    void* dy;   // or nullptr
    float* dw;  // [tokens, k], if there is y
    bool wide;  // grad and dy are fp32 and not of y's dtype
};

// Rows of logits, and where their losses, log Σ exp and entropies go. Formulas: peftcore/ops/cross_entropy.py.
struct CrossEntropyArgs {
    void* x;  // [M, columns]; the gradient takes their place
    int64_t columns;
    const int64_t* labels;  // [M]
    const float* weights;   // of the classes, or nullptr: all are 1
    double total_weight;    // their sum
    double smoothing, z_loss;
    float scale, cap;         // of the logits; cap 0: none
    const float* grad_scale;  // one factor of the gradient, or nullptr: 1
    int64_t ignore_index;
    bool gradient;                // else x stays
    float *loss, *lse, *entropy;  // [M]
};

// Sums over the classes of a row of logits so far, and its label's logit (scaled, capped).
struct ClassSums {
    float maximum = -std::numeric_limits<float>::infinity();
    float label = 0;
    double exponentials = 0, products = 0;  // Σ e^(z - maximum), Σ e^(z - maximum) (z - maximum)
    float rescaled = 1;  // what sums with the last maximum but one as reference are multiplied by
};

// A block of classes of rows of logits: they join the sums. With a gradient e^(z - maximum), by z's slope in x if there is
// a cap, take the logits' places, and 0 that of the label.
struct ClassBlockArgs {
    CrossEntropyArgs logits;  // of these classes
    int64_t first;            // class
    ClassSums* sums;          // [M]
};
constexpr int64_t kMostClasses = 2048;  // of a block: its logits of a row stay in the L1 cache

// A matrix of fp32 as bf16 halves: the rounded value, and the rounded rest. Two parts are these halves. In products of
// two matrices all terms but the smallest are in
//   [first, rest, first] [first, first, rest]ᵀ
// with three parts, so that one sum over the inner dimension has them. Part p of row i begins at
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

// Ranges are of rows.
struct ScaleKernels {
    void (*scale)(const ScaleArgs&, int64_t first_row, int64_t last_row);
    void (*backward)(const ScaleBackwardArgs&, int64_t first_row, int64_t last_row);
};

struct GateKernels {
    void (*forward)(const GateArgs&, int64_t first_row, int64_t last_row);
    void (*backward)(const GateArgs&, int64_t first_row, int64_t last_row);
};

struct ActivationKernels {
    void (*forward)(const ActivationArgs&, int64_t first, int64_t last);
    void (*backward)(const ActivationArgs&, int64_t first, int64_t last);
};

struct RmsNormKernels {
    void (*forward)(const RmsNormArgs&, int64_t first_row, int64_t last_row);
    void (*backward)(const RmsNormBackwardArgs&, int64_t first_row, int64_t last_row);
};

// Ranges are of tokens; in the gradient, of rows.
struct RowSumKernels {
    void (*sums)(const RowSumArgs&, int64_t first, int64_t last);
    void (*backward)(const RowSumBackwardArgs&, int64_t first, int64_t last);
};

constexpr int64_t kRowPadding = 16;  // values that RowKernels may write behind `to` or `out`

// For one row, fp32 in between; by the dtype of what they read (see rows.h).
struct RowKernels {
    void (*widen)(const void* from, int64_t count, float* to);
    void (*add)(const float* from, int64_t count, void* to);
    void (*multiply)(const float* x, const void* factor, int64_t inner, int64_t outer, float* out);
};

// [batch, heads, tokens, size]; the strides, in values, of all dimensions but the last, which is contiguous.
struct Heads {
    void* first;
    int64_t batch_stride, head_stride, token_stride;

    template <typename T>
    T* at(int64_t batch, int64_t head, int64_t token) const {
        return static_cast<T*>(first) + batch * batch_stride + head * head_stride + token * token_stride;
    }
};

constexpr int64_t kHeadSizeMultiple = 32;
constexpr int64_t kMostKeys = 4096;  // a block's scores of all keys stay in the L2 cache

// group_size query heads share a head of k and v.
struct AttentionArgs {
    int64_t key_heads, group_size, queries, keys, size;
    float scale;
    bool causal;
    const uint8_t* mask;  // 0: no attention; or nullptr
    int64_t mask_strides[4];
    Dropout dropout;    // of the probabilities, as rows of keys: [batch * heads * queries, keys]
    float kept_factor;  // of those that it keeps
    Heads q, k, v, out;
    float* lse;                      // [batch, heads, queries]
    Heads grad{}, dq{}, dk{}, dv{};  // of the gradient only
};

// Ranges are of pairs of a sample and a head of k.
struct AttentionKernels {
    void (*forward)(const AttentionArgs&, int64_t first, int64_t last) = nullptr;
    void (*backward)(const AttentionArgs&, int64_t first, int64_t last) = nullptr;
};

constexpr int kWidthMultiple = 16;  // of `width`
constexpr int kColumnGrain = 32, kRowGrain = 64;

// Kernels of a level; arrays are indexed by Dtype.
struct Kernels {
    ThinKernels thin[kDtypes];
    RowKernels row[kDtypes];
    ScaleKernels scale[kDtypes];
    GateKernels gate[kDtypes];
    ActivationKernels activation[kDtypes];
    void (*dropped[kDtypes])(const DropArgs&, int64_t first_row, int64_t last_row);
    RmsNormKernels rms_norm[kDtypes];
    RowSumKernels row_sum[kDtypes];
    void (*cross_entropy[kDtypes])(const CrossEntropyArgs&, int64_t first_row, int64_t last_row);
    void (*class_block[kDtypes])(const ClassBlockArgs&, int64_t first_row, int64_t last_row);
    void (*norms[kDtypes])(const NormArgs&, int64_t first_row, int64_t last_row);
    std::array<AttentionKernels, kDtypes> attention;  // empty: PyTorch's is used
};

void fill_portable(Kernels&);
void fill_avx2(Kernels&);
void fill_avx512(Kernels&);
void fill_avx512bf16(Kernels&);
void fill_avx512bf16(ThinKernels&);  // of bf16
void fill_amx(Kernels&);
void fill_neon(Kernels&);

}  // namespace lora
}  // namespace peftcore
