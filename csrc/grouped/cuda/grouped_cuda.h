// Launchers of the CUDA kernels of experts. Pointers are device memory, except for pointers to structs; `stream` is a
// cudaStream_t; matrices are contiguous. Factors and thin matrices [rows, rank] are fp32. They return nullptr, or why
// the launch failed. The caller checks arguments (grouped/arguments.h), except for the offsets, which stay on the
// device: if they do not increase from 0 to `rows`, nothing is read out of range, and NaN is written.
#pragma once

#include <cstdint>

#include "common/dropout.h"
#include "common/dtype.h"
#include "weight/view.h"

namespace peftcore {
namespace grouped {

// Rows sorted by expert; rows behind the last offset belong to none.
struct Groups {
    const int32_t* offsets;  // [experts]: the end of each expert's rows
    int64_t experts, rows;
};

// out_i = wide_i W_eᵀ + bias_e + thin_i F_eᵀ for each row of an expert, zero for rows without an expert.
struct Skinny {
    Groups groups;
    Dtype dtype;       // of wide, bias and out
    const void* wide;  // [rows, inner]
    void* out;         // [rows, columns]
    int64_t inner, columns;
    WeightView weight;    // in 4 bits, [experts * columns, inner]
    const void* bias;     // [experts, columns] or nullptr
    const float* thin;    // [rows, rank]
    const float* factor;  // F [experts, columns, rank]
    int rank;             // 0: neither thin nor factor
};

// out_i += bias_e + keep ∘ (thin_i F_eᵀ) for each row of an expert; zero for rows without an expert.
struct Up {
    Groups groups;
    Dtype dtype;  // of bias and out
    int64_t columns;
    const void* bias;     // [experts, columns] or nullptr
    const float* thin;    // [rows, rank]
    const float* factor;  // F [experts, columns, rank]
    int rank;             // 0: neither thin nor factor
    Dropout dropout;
    void* out;  // [rows, columns]
};

// out_i = scale (keep ∘ wide_i) F_eᵀ for each row of an expert, zero for rows without an expert.
struct Down {
    Groups groups;
    Dtype dtype;       // of wide
    const void* wide;  // [rows, columns]
    int64_t columns;
    const float* factor;  // F [experts, rank, columns], or across [experts, columns, rank]
    bool across;
    int rank;
    float scale;
    Dropout dropout;
    float* out;  // [rows, rank]
};

// out_e = (keep ∘ wide)_eᵀ thin_e, summed over the rows of each expert in order.
struct Reduce {
    Groups groups;
    Dtype dtype;        // of wide
    const void* wide;   // [rows, columns]
    const float* thin;  // [rows, rank]
    int64_t columns;
    int rank;
    Dropout dropout;
    Dtype out_dtype;
    bool transposed;
    void* out;  // [experts, columns, rank], or transposed [experts, rank, columns]
};

}  // namespace grouped
}  // namespace peftcore

extern "C" {

// The product of few rows per expert, directly from 4 bits, where `peftcore_grouped_is_skinny`.
const char* peftcore_grouped_skinny(const peftcore::grouped::Skinny* product, void* stream);
bool peftcore_grouped_is_skinny(const peftcore::grouped::Skinny* product);

const char* peftcore_grouped_up(const peftcore::grouped::Up* up, void* stream);
const char* peftcore_grouped_down(const peftcore::grouped::Down* down, void* stream);
const char* peftcore_grouped_reduce(const peftcore::grouped::Reduce* reduce, void* stream);
}
