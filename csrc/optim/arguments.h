// Argument checks of the optimizer steps, the same for every backend, and the segments they stand for.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "common/check.h"
#include "common/integers.h"
#include "optim/optim.h"

namespace peftcore {
namespace optim {

using at::Tensor;

inline Rule rule_of(std::string_view name, const char* op) {
    if (name == "adamw") return Rule::kAdamW;
    if (name == "adamw_8bit") return Rule::kAdamW8bit;
    if (name == "lion") return Rule::kLion;
    if (name == "momentum") return Rule::kMomentum;
    TORCH_CHECK_VALUE(false, op, ": no rule '", name, "' (there are: adamw, adamw_8bit, lion, momentum)");
}

inline int64_t blocks_of(int64_t count) { return ceil_div(count, kBlock); }

// What every rule reads: parameters, gradients, and the row of scalars for each.
struct Step {
    Rule rule;
    std::vector<Scalars> rows;
    std::vector<Segment> segments;  // one a parameter, without state
};

inline Step step_arguments(at::TensorList params, at::TensorList grads, std::string_view rule,
                           at::ArrayRef<double> scalars, at::IntArrayRef steps, at::IntArrayRef rows,
                           at::IntArrayRef streams, const char* op) {
    Step step;
    step.rule = rule_of(rule, op);
    TORCH_CHECK_VALUE(grads.size() == params.size() && rows.size() == params.size(), op, ": ", params.size(),
                      " params need as many grads and rows, found ", grads.size(), " and ", rows.size());
    TORCH_CHECK_VALUE(streams.empty() || streams.size() == params.size(), op,
                      ": streams must be empty or one a parameter, found ", streams.size());
    TORCH_CHECK_VALUE(scalars.size() == steps.size() * kScalars, op, ": ", steps.size(), " rows need ",
                      steps.size() * kScalars, " scalars, found ", scalars.size());
    step.rows.resize(steps.size());
    for (size_t i = 0; i < scalars.size(); ++i)
        step.rows[i / kScalars].value[i % kScalars] = float(scalars[i]);
    step.segments.resize(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
        const Tensor &p = params[i], &g = grads[i];
        Segment& segment = step.segments[i];
        segment = {};
        segment.param_dtype = kernel_dtype(p.scalar_type(), op, "params");
        segment.grad_dtype = kernel_dtype(g.scalar_type(), op, "grads");
        TORCH_CHECK_VALUE(p.device() == params[0].device() && g.device() == p.device(), op,
                          ": params and grads must be on one device, found ", p.device(), " and ", g.device(),
                          " beside ", params[0].device());
        TORCH_CHECK_VALUE(g.numel() == p.numel(), op, ": a gradient of shape ", g.sizes(),
                          " for a parameter of shape ", p.sizes());
        TORCH_CHECK_VALUE(p.is_contiguous() && g.is_contiguous(), op,
                          ": params and grads must be contiguous");
        TORCH_CHECK_VALUE(rows[i] >= 0 && rows[i] < int64_t(steps.size()), op, ": row ", rows[i], " of ",
                          steps.size());
        segment.param = p.mutable_data_ptr();
        segment.grad = g.const_data_ptr();
        segment.count = p.numel();
        segment.row = int32_t(rows[i]);
        segment.step = steps[rows[i]];
        segment.stream = streams.empty() ? -1 : streams[i];
    }
    return step;
}

// State in tensors of its own: plane by plane, in each plane one tensor a parameter.
inline void attach_state(Step& step, at::TensorList state, const at::Device& device, const char* op) {
    const Planes planes = planes_of(step.rule);
    const size_t count = step.segments.size();
    TORCH_CHECK_VALUE(state.size() == count * planes.count, op, ": ", count, " params need ",
                      count * planes.count, " tensors of state, found ", state.size());
    for (size_t i = 0; i < state.size(); ++i) {
        Segment& segment = step.segments[i % count];
        const int bytes = planes.bytes[i / count];
        const bool codes = bytes == kBlock;
        check_tensor(state[i], codes ? at::kByte : at::kFloat, device, op, "state");
        check_numel(state[i], bytes < kBlock ? blocks_of(segment.count) : segment.count, op, "state",
                    bytes < kBlock ? "one a block of 256" : "one an element");
        TORCH_CHECK_VALUE(state[i].is_contiguous(), op, ": state must be contiguous");
        segment.state[i / count] = state[i].mutable_data_ptr();
    }
}

}  // namespace optim
}  // namespace peftcore
