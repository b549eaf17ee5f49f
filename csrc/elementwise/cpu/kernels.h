// Arguments and table of the kernels of activations, gates, dropout and scaling by column.
#pragma once

#include <cstdint>

#include "common/dropout.h"
#include "common/dtype.h"

namespace peftcore {
namespace elementwise {

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
    float* sums;  // dy ∘ x is added to it; columns are padded to whole vectors; or nullptr
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

// y = act(x), or dx if there is `dy`. act(x) is x Φ(x) with the normal distribution Φ, or as in GateArgs. Ranges count
// values.
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

// Ranges count rows.
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

// Arrays are indexed by Dtype.
struct Kernels {
    ScaleKernels scale[kDtypes];
    GateKernels gate[kDtypes];
    ActivationKernels activation[kDtypes];
    void (*dropout[kDtypes])(const DropArgs&, int64_t first_row, int64_t last_row);
};

}  // namespace elementwise
}  // namespace peftcore
