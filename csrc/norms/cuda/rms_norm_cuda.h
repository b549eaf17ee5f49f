// Launchers of the kernels of rms_norm. Pointers are device memory; `stream` is a cudaStream_t.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace peftcore {
namespace norms {

// Formulas: peftcore/ops/rms_norm.py. Matrices [rows, columns] of `dtype` are contiguous.
struct RmsNormCall {
    Dtype dtype, weight_dtype;
    int64_t rows, columns;
    const void* x;
    const void* weight;  // [columns]
    float eps, offset;
    bool rounded;  // x r is rounded before the product
    void* y;
    float* scale;  // r [rows]: written by the forward pass and read by the backward passes
    // Of the gradients:
    const void* dy;
    void* dx;
    float* sums;  // [peftcore_rms_norm_groups(rows), columns]: of dy ∘ round?(x r) over each group of rows
};

}  // namespace norms
}  // namespace peftcore

extern "C" {
const char* peftcore_rms_norm(const peftcore::norms::RmsNormCall* call, void* stream);
const char* peftcore_rms_norm_dx(const peftcore::norms::RmsNormCall* call, void* stream);
int64_t peftcore_rms_norm_groups(int64_t rows);
// Writes `sums`, which peftcore_sum adds.
const char* peftcore_rms_norm_dweight(const peftcore::norms::RmsNormCall* call, void* stream);
}
