// Kernels of each SIMD level. All levels give the same bits.
#pragma once

#include "optim/dynamic8.h"
#include "optim/rounding.h"
#include "optim/rules.h"

namespace peftcore {
namespace optim {

struct Kernels {
    // 16 bits to fp32 and back, rounded to nearest or at random.
    void (*widen)(const void* x, Dtype dtype, int64_t count, float* out);
    void (*narrow)(const float* x, int64_t count, Dtype dtype, void* out);
    // `first` is the index of x[0] in its parameter, a multiple of 256.
    void (*narrow_stochastic)(const float* x, int64_t count, Dtype dtype, void* out, int64_t stream,
                              int64_t step, int64_t first);
    // The update of each rule, by its index in `Rules`: `count` elements in fp32 and their state, the first
    // of which begins a block.
    void (*update[Rules::kCount])(float* p, const float* g, void* const* state, int64_t count,
                                  const Scalars& scalars);
};

void fill_portable(Kernels&);
void fill_avx2(Kernels&);
void fill_avx512(Kernels&);
void fill_neon(Kernels&);

}  // namespace optim
}  // namespace peftcore
