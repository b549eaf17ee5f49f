// Launchers of the LoRA CUDA kernels. They return nullptr or an error message. Pointers are device memory unless noted,
// `stream` is a cudaStream_t, and matrices are contiguous. Factors and thin matrices [rows, rank] are fp32, because small
// gradients would underflow in an fp16 T. The caller checks arguments (lora/arguments.h).
#pragma once

#include <cstdint>

#include "common/cuda_sum.h"
#include "common/dropout.h"
#include "common/dtype.h"
#include "weight/view.h"

namespace peftcore {
namespace lora {

// The single pass writes rank / 32 as many bytes as it reads of `wide`; above this rank a second pass is cheaper.
constexpr int kOnePassMaxRank = 16;

constexpr int kRankDotRows = 8;  // of x: a block computes one rank of s

// x, dy, or the output: [samples * rows, columns] of `dtype`.
struct Wide {
    void* values;
    Dtype dtype;
    int64_t samples, rows, columns;
};

// Factors of numbered adapters. The first three are host arrays of `count` entries.
struct Factors {
    const float* const* values;
    const int* ranks;
    const float* scales;  // or nullptr: 1
    int count;
    int stride;            // columns of the thin matrix, at least the highest rank
    const int64_t* index;  // each sample's adapter; nullptr: the first one for all
};

// out[i] = scale (partial[0][i] + partial[1][i] + ...), in this order, rounded once.
struct Sum {
    const float* partial;  // [parts, count]
    int64_t parts, count;
    float scale;
    void* out;
};

// Copy of a contiguous factor [rows, columns] of `dtype` to fp32, possibly transposed.
struct FactorCopy {
    const void* from;
    Dtype dtype;
    int64_t rows, columns;
    bool transposed;
    float* to;
};

// y [batch, rows] = x Wᵀ + bias + s Bᵀ and s [batch, rank] = scale x Aᵀ: x, bias (or nullptr) and y of `dtype`.
struct OneLaunch {
    const void* x;
    Dtype dtype;
    int batch;
    const void *bias, *a, *b;  // A [rank, columns], B [rows, rank]
    Dtype a_dtype, b_dtype;
    int rank;
    float scale;
    float* s;
    void* y;
};

}  // namespace lora
}  // namespace peftcore

extern "C" {

// s [samples * rows, stride] = scale_i (keep ∘ x) factor_iᵀ, x of 16 bits, factors [rank_i, columns]. Samples
// whose i is not an adapter get no s. `partial`: peftcore_lora_down_workspace floats.
const char* peftcore_lora_down(const peftcore::lora::Wide* x, const peftcore::lora::Factors* factors,
                               const peftcore::Dropout* dropout, float* partial, float* s, void* stream);
int64_t peftcore_lora_down_workspace(int64_t rows, int64_t columns, int rank);

// y and s in one launch, for up to 8 rows of x of 16 bits and a weight in 4 bits of whole blocks of 64; for other
// shapes, and where `stream` has no counters left, nothing is launched and `launched` is false.
const char* peftcore_lora_one_launch(const peftcore::lora::OneLaunch* call,
                                     const peftcore::WeightView* weight, bool* launched, void* stream);

// out = bias + keep ∘ (thin factor_iᵀ), without bias where that is nullptr, or added to it where `add`; thin
// [samples * rows, stride], out and bias [columns] of one dtype, of 16 bits, factors [columns, rank_i]. i = -1
// adds nothing; any other i without an adapter makes its rows NaN.
const char* peftcore_lora_up(const float* thin, const peftcore::lora::Factors* factors,
                             const peftcore::Dropout* dropout, const void* bias, bool add,
                             const peftcore::lora::Wide* out, void* stream);

// out = (keep ∘ wide)ᵀ thin, [columns, rank] or transposed [rank, columns], of `out_dtype`; wide of 16 bits and
// of one sample, thin [rows, rank]. `partial`: peftcore_lora_reduce_workspace floats.
const char* peftcore_lora_reduce(const peftcore::lora::Wide* wide, const float* thin, int rank,
                                 const peftcore::Dropout* dropout, float* partial, void* out, int out_dtype,
                                 bool transposed, void* stream);
int64_t peftcore_lora_reduce_workspace(int64_t rows, int64_t columns, int rank);

// In one pass over wide: out [columns, rank] as above, without dropout, and product [rows, rank] =
// scale wide factorᵀ; factor [rank, columns]. rank <= kOnePassMaxRank. `partial`:
// peftcore_lora_reduce_workspace floats; `product_partial`: peftcore_lora_product_workspace.
const char* peftcore_lora_reduce_and_product(const peftcore::lora::Wide* wide, const float* thin,
                                             const float* factor, int rank, float scale, float* partial,
                                             float* product_partial, void* out, int out_dtype, float* product,
                                             void* stream);
int64_t peftcore_lora_product_workspace(int64_t rows, int64_t columns, int rank);

// out = keep ∘ x, of one sample; out may be x.
const char* peftcore_lora_drop(const peftcore::lora::Wide* x, const peftcore::Dropout* dropout, void* out,
                               void* stream);

// Two sums in a launch, the first of `dtype`, the second of fp32.
const char* peftcore_lora_sum_pair(const peftcore::lora::Sum* first, int dtype,
                                   const peftcore::lora::Sum* second, void* stream);

// Any number of factors, up to 64 in a launch.
const char* peftcore_lora_copy_factors(const peftcore::lora::FactorCopy* copies, int count, void* stream);
}
