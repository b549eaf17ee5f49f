// Launchers of the kernels of gated and swiglu. Pointers are device memory; `stream` is a cudaStream_t.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace peftcore {
namespace elementwise {

// Formulas: peftcore/ops/gated.py and swiglu.py.
struct GatedCall {
    Dtype dtype;
    const void *gate, *up;          // [rows, columns], rows `stride` values apart
    int64_t rows, columns, stride;  // a single row, for matrices without gaps
    float linear, cubic;
    bool rounded;  // act(gate) is rounded before the product
    void* y;       // [rows, columns]
    // Of the gradients:
    const void* dy;     // [rows, columns]
    void *dgate, *dup;  // as gate and up
};

}  // namespace elementwise
}  // namespace peftcore

extern "C" {
const char* peftcore_gated(const peftcore::elementwise::GatedCall* call, void* stream);
const char* peftcore_gated_backward(const peftcore::elementwise::GatedCall* call, void* stream);
}
