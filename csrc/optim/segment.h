// Arguments of the kernels: runs of elements of parameters, and the scalars of their updates. Shared by host and
// device.
#pragma once

#include "common/dtype.h"
#include "common/half.h"

namespace peftcore {
namespace optim {

constexpr int kBlock = 256;  // elements; a parameter's state begins at a whole block
constexpr int kMaxPlanes = 4;
constexpr int kMaxScalars = 8;

// The scalars of one update, which a rule of rules.h reads by their names.
struct Scalars {
    float value[kMaxScalars];
};

template <typename Rule>
static PEFTCORE_HD Rule with_scalars(const Scalars& scalars) {
    static_assert(sizeof(Rule) <= sizeof(Scalars),
                  "a rule has at most kMaxScalars scalars, and nothing else");
    Rule rule;
    memcpy(&rule, scalars.value, sizeof rule);
    return rule;
}

// A run of elements of one parameter with contiguous state.
struct Segment {
    void* param;
    const void* grad;
    void* state[kMaxPlanes];  // at the first element
    int64_t count;
    int64_t first;   // index of its first element in the parameter, a multiple of 256
    int64_t stream;  // key of the random bits; negative: round to nearest
    int64_t step;    // their counter
    int32_t row;     // of the scalars
    Dtype param_dtype, grad_dtype;
};

}  // namespace optim
}  // namespace peftcore
