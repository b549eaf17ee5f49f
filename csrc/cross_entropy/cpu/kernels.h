// Arguments and table of the cross-entropy kernels.
#pragma once

#include <cstdint>
#include <limits>

namespace peftcore {
namespace cross_entropy {

// Rows of logits, and where their loss, log Σ exp and entropy are written. Formulas: peftcore/ops/cross_entropy.py.
struct CrossEntropyArgs {
    void* x;  // [M, columns]; overwritten by the gradient
    int64_t columns;
    const int64_t* labels;  // [M]
    const float* weights;   // of the classes, or nullptr: all are 1
    double total_weight;    // their sum
    double smoothing, z_loss;
    float scale, cap;         // of the logits; cap 0: none
    const float* grad_scale;  // one factor of the gradient, or nullptr: 1
    int64_t ignore_index;
    bool gradient;                // false: x is left as it is
    float *loss, *lse, *entropy;  // [M]
};

// Running sums over the classes of a row of logits, and its label's logit (scaled, capped).
struct ClassSums {
    float maximum = -std::numeric_limits<float>::infinity();
    float label = 0;
    double exponentials = 0, products = 0;  // Σ e^(z - maximum), Σ e^(z - maximum) (z - maximum)
    float rescaled = 1;  // factor from the previous maximum to this one, for other sums that used it
};

// A block of classes of rows of logits, which are added to the rows' sums. For a gradient, each logit is overwritten by
// e^(z - maximum), times the slope of z in x if there is a cap, and the label's logit by 0.
struct ClassBlockArgs {
    CrossEntropyArgs logits;  // of these classes
    int64_t first;            // class
    ClassSums* sums;          // [M]
};
constexpr int64_t kMostClasses = 2048;  // of a block: its logits of a row stay in the L1 cache

// For logits of one dtype; ranges are of rows.
struct Kernels {
    void (*rows)(const CrossEntropyArgs&, int64_t first_row, int64_t last_row);
    void (*class_block)(const ClassBlockArgs&, int64_t first_row, int64_t last_row);
};

}  // namespace cross_entropy
}  // namespace peftcore
