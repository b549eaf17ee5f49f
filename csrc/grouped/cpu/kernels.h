// Arguments and table of the kernels that combine the rows of experts into tokens.
#pragma once

#include <cstdint>

namespace peftcore {
namespace grouped {

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
    const int64_t* order;  // each row's pair (t, j), as t k + j
    int64_t k;
    void* dy;   // or nullptr
    float* dw;  // [tokens, k], if there is y
    bool wide;  // grad and dy are fp32 and not of y's dtype
};

// Ranges count tokens; in the gradient, rows.
struct RowSumKernels {
    void (*sums)(const RowSumArgs&, int64_t first, int64_t last);
    void (*backward)(const RowSumBackwardArgs&, int64_t first, int64_t last);
};

}  // namespace grouped
}  // namespace peftcore
