// Optimizer steps on CPU, state in tensors or in pages.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "common/caches.h"
#include "cpu/kernels.h"
#include "optim/operators.h"

namespace peftcore {
namespace optim {
namespace {

// 16-bit parameters and gradients are widened in pieces that stay in the L1 cache.
constexpr int64_t kSpan = 2048;
static_assert(2 * kSpan * sizeof(float) <= kSmallestFirst);

// Elements `begin` to `end` of a segment; `begin` is a multiple of 256.
void update_range(const Kernels& level, const Step& step, const Segment& s, int64_t begin, int64_t end) {
    const std::vector<Plane>& planes = step.rule.planes;
    char* param = static_cast<char*>(s.param);
    const char* grad = static_cast<const char*>(s.grad);
    const bool wide_param = s.param_dtype == Dtype::kFloat, wide_grad = s.grad_dtype == Dtype::kFloat;
    const int64_t span = wide_param && wide_grad ? end - begin : kSpan;
    // Aligned to a page like pages of state: otherwise the processor could take stores here for aliases of loads of
    // state.
    alignas(4096) float p_span[kSpan], g_span[kSpan];
    for (int64_t i = begin; i < end; i += span) {
        const int64_t count = std::min(span, end - i);
        float* p = wide_param ? reinterpret_cast<float*>(param) + i : p_span;
        const float* g = wide_grad ? reinterpret_cast<const float*>(grad) + i : g_span;
        void* narrow_param = param + i * itemsize(s.param_dtype);
        if (!wide_param) level.widen(narrow_param, s.param_dtype, count, p_span);
        if (!wide_grad) level.widen(grad + i * 2, s.grad_dtype, count, g_span);
        void* state[kMaxPlanes] = {};
        for (size_t plane = 0; plane < planes.size(); ++plane)
            state[plane] = static_cast<char*>(s.state[plane]) + i / kBlock * planes[plane].block_bytes;
        level.update[step.rule.number](p, g, state, count, step.rows[s.row]);
        if (wide_param) continue;
        if (s.stream < 0)
            level.narrow(p_span, count, s.param_dtype, narrow_param);
        else
            level.narrow_stochastic(p_span, count, s.param_dtype, narrow_param, s.stream, s.step,
                                    s.first + i);
    }
}

// Threads share the blocks of all segments, so that a thousand small segments scale like a large one.
void update(const Step& step, const std::vector<Segment>& segments, int64_t blocks_per_task) {
    const size_t count = segments.size();
    std::vector<int64_t> first_block(count + 1, 0);
    for (size_t i = 0; i < count; ++i) first_block[i + 1] = first_block[i] + blocks_of(segments[i].count);
    const Kernels& level = cpu_kernels().optim;
    at::parallel_for(0, first_block[count], blocks_per_task, [&](int64_t first, int64_t last) {
        size_t i = std::upper_bound(first_block.begin(), first_block.end(), first) - first_block.begin() - 1;
        for (int64_t block = first; block < last; block = first_block[++i]) {
            const Segment& segment = segments[i];
            const int64_t begin = (block - first_block[i]) * kBlock;
            const int64_t end = std::min(segment.count, (last - first_block[i]) * kBlock);
            if (begin < end) update_range(level, step, segment, begin, end);
        }
    });
}

}  // namespace

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("optim_step_", &Operators<update>::optim_step_);
    m.impl("optim_step_paged_", &Operators<update>::optim_step_paged_);
}

}  // namespace optim
}  // namespace peftcore
