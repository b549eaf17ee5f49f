// Optimizer steps on CPU, state in tensors or in a pool. Schemas: peftcore/ops/optim.py.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "common/caches.h"
#include "cpu/kernels.h"
#include "optim/paged.h"

namespace peftcore {
namespace optim {
namespace {

// 16-bit values are widened in pieces, of parameters and gradients, that stay in the first cache.
constexpr int64_t kSpan = 2048;
static_assert(2 * kSpan * sizeof(float) <= kSmallestFirst);

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

// `begin` is a multiple of 256.
void update_floats(const Kernels& level, Rule rule, const Segment& s, const Scalars& row, float* p,
                   const float* g, int64_t begin, int64_t count) {
    float* state[2] = {static_cast<float*>(s.state[0]) + begin, static_cast<float*>(s.state[1]) + begin};
    switch (rule) {
        case Rule::kAdamW:
            return level.adamw(p, g, state[0], state[1], count, row.adamw);
        case Rule::kLion:
            return level.lion(p, g, state[0], count, row.lion);
        case Rule::kMomentum:
            return level.momentum(p, g, state[0], count, row.momentum);
        case Rule::kAdamW8bit:
            for (int64_t i = 0; i < count; i += kBlock) {
                const int64_t at = begin + i, block = at / kBlock;
                level.adamw_8bit(
                    p + i, g + i, static_cast<uint8_t*>(s.state[0]) + at,
                    static_cast<uint8_t*>(s.state[1]) + at, static_cast<float*>(s.state[2]) + block,
                    static_cast<float*>(s.state[3]) + block, std::min<int64_t>(kBlock, count - i), row.adamw);
            }
    }
}

void update_range(const Kernels& level, Rule rule, const Segment& s, const Scalars& row, int64_t begin,
                  int64_t end) {
    char* param = static_cast<char*>(s.param);
    const char* grad = static_cast<const char*>(s.grad);
    const bool wide_param = s.param_dtype == Dtype::kFloat, wide_grad = s.grad_dtype == Dtype::kFloat;
    const int64_t span = wide_param && wide_grad ? end - begin : kSpan;
    float p_span[kSpan], g_span[kSpan];
    for (int64_t i = begin; i < end; i += span) {
        const int64_t count = std::min(span, end - i);
        float* p = wide_param ? reinterpret_cast<float*>(param) + i : p_span;
        const float* g = wide_grad ? reinterpret_cast<const float*>(grad) + i : g_span;
        void* narrow_param = param + i * bytes_of(s.param_dtype);
        if (!wide_param) level.widen(narrow_param, s.param_dtype, count, p_span);
        if (!wide_grad) level.widen(grad + i * 2, s.grad_dtype, count, g_span);
        update_floats(level, rule, s, row, p, g, i, count);
        if (wide_param) continue;
        if (s.stream < 0)
            level.narrow(p_span, count, s.param_dtype, narrow_param);
        else
            level.narrow_stochastic(p_span, count, s.param_dtype, narrow_param, s.stream, s.step,
                                    s.first + i);
    }
}

void optim_step_(at::TensorList params, at::TensorList grads, at::TensorList state, std::string_view rule,
                 at::ArrayRef<double> scalars, at::IntArrayRef steps, at::IntArrayRef rows,
                 at::IntArrayRef streams) {
    const char* op = "optim_step_";
    Step step = step_arguments(params, grads, rule, scalars, steps, rows, streams, op);
    attach_state(step, state, params[0].device(), op);
    update(step.rule, step.segments.data(), step.segments.size(), step.rows.data());
}

void optim_step_paged_(at::TensorList params, at::TensorList grads, int64_t pool, at::IntArrayRef slots,
                       std::string_view rule, at::ArrayRef<double> scalars, at::IntArrayRef steps,
                       at::IntArrayRef rows, at::IntArrayRef streams, int64_t sweep, bool backward) {
    const char* op = "optim_step_paged_";
    const Step step = step_arguments(params, grads, rule, scalars, steps, rows, streams, op);
    // A page that came from the disk took longer than one thread does: others would only wait for it, busily.
    const std::shared_ptr<Pool> pages = pool_of(pool, op);
    const int64_t page = page_blocks(step.rule, pages->page_bytes());
    sweep_pages(*pages, step, slots, sweep, backward, op,
                [&](const std::vector<Segment>& segments, bool rests) {
                    update(step.rule, segments.data(), segments.size(), step.rows.data(),
                           rests ? kBlocksPerTask : page);
                });
}

}  // namespace

void update(Rule rule, const Segment* segments, size_t count, const Scalars* rows, int64_t blocks_per_task) {
    // Threads share the blocks of all segments, so a thousand small ones scale as one large one does.
    std::vector<int64_t> first_block(count + 1, 0);
    for (size_t i = 0; i < count; ++i) first_block[i + 1] = first_block[i] + blocks_of(segments[i].count);
    const Kernels& level = cpu_kernels().optim;
    at::parallel_for(0, first_block[count], blocks_per_task, [&](int64_t first, int64_t last) {
        size_t i = std::upper_bound(first_block.begin(), first_block.end(), first) - first_block.begin() - 1;
        for (int64_t block = first; block < last; block = first_block[++i]) {
            const Segment& segment = segments[i];
            const int64_t begin = (block - first_block[i]) * kBlock;
            const int64_t end = std::min(segment.count, (last - first_block[i]) * kBlock);
            if (begin < end) update_range(level, rule, segment, rows[segment.row], begin, end);
        }
    });
}

TORCH_LIBRARY_IMPL(peftcore, CPU, m) {
    m.impl("optim_step_", &optim_step_);
    m.impl("optim_step_paged_", &optim_step_paged_);
}

}  // namespace optim
}  // namespace peftcore
