// Arguments and table of the kernels of norms.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace peftcore {
namespace norms {

// y = (x r) ∘ g with r = 1 / √(mean of x² + eps) of each row.
struct RmsNormArgs {
    const void* x;  // [M, columns]
    int64_t columns;
    const float* g;  // [columns], padded with zeros to kNormPadding
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
    float* sums;  // dy ∘ (x r) is added to it; columns are padded to kNormPadding; or nullptr
};

constexpr int64_t kNormPadding = 16;

// norms[i]: the norm of row i of x + left right.
struct RowNormsArgs {
    const void* x;  // [M, columns]
    int64_t columns;
    const float* left;  // [M, inner]
    int64_t inner;
    const float* right;  // [inner][width], in the plain arrangement
    int64_t width;
    float* norms;  // [M]
};

// Ranges count rows.
struct RmsNormKernels {
    void (*forward)(const RmsNormArgs&, int64_t first_row, int64_t last_row);
    void (*backward)(const RmsNormBackwardArgs&, int64_t first_row, int64_t last_row);
};

// Arrays are indexed by Dtype.
struct Kernels {
    RmsNormKernels rms_norm[kDtypes];
    void (*row_norms[kDtypes])(const RowNormsArgs&, int64_t first_row, int64_t last_row);
};

}  // namespace norms
}  // namespace peftcore
