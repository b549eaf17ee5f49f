// Launcher of the kernel of cross_entropy_rows_. Pointers are device memory; `stream` is a cudaStream_t.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace peftcore {
namespace cross_entropy {

// Formulas: peftcore/ops/cross_entropy.py.
struct CrossEntropyCall {
    void* x;  // [rows, columns] of `dtype`, contiguous; the gradient takes their place
    Dtype dtype;
    int64_t rows, columns;
    const int64_t* labels;      // [rows]
    const float* weights;       // of the classes, or nullptr: all are 1
    const float* total_weight;  // their sum, or nullptr
    float smoothing, z_loss, scale, cap;
    const float* grad_scale;  // one factor of the gradient, or nullptr: 1
    int64_t ignore_index;
    bool gradient;  // else x stays
    float* out;     // [3, rows]: losses, log Σ exp, entropies
};

}  // namespace cross_entropy
}  // namespace peftcore

extern "C" {
// The loss of a row whose label is outside the vocabulary is NaN.
const char* peftcore_cross_entropy_rows(const peftcore::cross_entropy::CrossEntropyCall* call, void* stream);
}
