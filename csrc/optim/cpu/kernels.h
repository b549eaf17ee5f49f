// What each SIMD level supplies. All levels give the same bits.
#pragma once

#include "optim/dynamic8.h"
#include "optim/optim.h"

namespace peftcore {
namespace optim {

struct Kernels {
    // 16 bits to fp32 and back, to the nearest or at random.
    void (*widen)(const void* x, Dtype dtype, int64_t count, float* out);
    void (*narrow)(const float* x, int64_t count, Dtype dtype, void* out);
    // `first` is the place of x[0] in its parameter, a multiple of 256.
    void (*narrow_stochastic)(const float* x, int64_t count, Dtype dtype, void* out, int64_t stream,
                              int64_t step, int64_t first);
    // One call of a rule on `count` elements in fp32. AdamW 8-bit: one block, `count` at most 256.
    void (*adamw)(float* p, const float* g, float* m, float* v, int64_t count, const AdamW&);
    void (*adamw_8bit)(float* p, const float* g, uint8_t* m, uint8_t* v, float* m_absmax, float* v_absmax,
                       int64_t count, const AdamW&);
    void (*lion)(float* p, const float* g, float* m, int64_t count, const Lion&);
    void (*momentum)(float* p, const float* g, float* buffer, int64_t count, const Momentum&);
};

void fill_portable(Kernels&);
void fill_avx2(Kernels&);
void fill_avx512(Kernels&);

// Updates the elements of all segments, the work shared evenly between threads, of which each takes at least
// `blocks_per_task` blocks of 256 elements.
constexpr int64_t kBlocksPerTask = 64;
void update(Rule rule, const Segment* segments, size_t count, const Scalars* rows,
            int64_t blocks_per_task = kBlocksPerTask);

}  // namespace optim
}  // namespace peftcore
