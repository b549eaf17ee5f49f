// Argument checks of the optimizer steps, shared by all backends, and the segments that they give.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "common/check.h"
#include "optim/rule_table.h"

namespace peftcore {
namespace optim {

// An operator's arguments other than tensors: `Updates` of peftcore/ops/optim.py, and the rule's name.
struct Updates {
    std::string_view rule;
    at::ArrayRef<double> scalars;
    at::IntArrayRef steps, rows, streams;
};

struct Step {
    const RuleEntry& rule;
    c10::Device device;
    std::vector<Scalars> rows;
    std::vector<Segment> segments;  // one per parameter
};

// The step of some parameters, before their state is attached.
inline Step step_of(at::TensorList params, at::TensorList grads, const Updates& updates, const char* op) {
    const auto [rule, scalars, steps, rows, streams] = updates;
    Step step = {rule_named(rule, op), params.empty() ? c10::Device(c10::kCPU) : params[0].device(), {}, {}};
    TORCH_CHECK_VALUE(grads.size() == params.size() && rows.size() == params.size(), op, ": ", params.size(),
                      " params need as many grads and rows, found ", grads.size(), " and ", rows.size());
    TORCH_CHECK_VALUE(streams.empty() || streams.size() == params.size(), op,
                      ": streams must be empty or one a parameter, found ", streams.size());
    const size_t per_row = size_t(step.rule.scalars);
    TORCH_CHECK_VALUE(scalars.size() == steps.size() * per_row, op, ": ", steps.size(), " rows need ",
                      steps.size() * per_row, " scalars, found ", scalars.size());
    step.rows.resize(steps.size());
    for (size_t i = 0; i < scalars.size(); ++i) step.rows[i / per_row].value[i % per_row] = float(scalars[i]);
    step.segments.resize(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
        const at::Tensor &p = params[i], &g = grads[i];
        TORCH_CHECK_VALUE(p.device() == step.device && g.device() == step.device, op,
                          ": params and grads must be on one device, found ", p.device(), " and ", g.device(),
                          ", with others on ", step.device);
        TORCH_CHECK_VALUE(g.numel() == p.numel(), op, ": a gradient of shape ", g.sizes(),
                          " for a parameter of shape ", p.sizes());
        TORCH_CHECK_VALUE(p.is_contiguous() && g.is_contiguous(), op,
                          ": params and grads must be contiguous");
        TORCH_CHECK_VALUE(rows[i] >= 0 && rows[i] < int64_t(steps.size()), op, ": row ", rows[i], " of ",
                          steps.size());
        step.segments[i] = {.param = p.mutable_data_ptr(),
                            .grad = g.const_data_ptr(),
                            .state = {},
                            .count = p.numel(),
                            .first = 0,
                            .stream = streams.empty() ? -1 : streams[i],
                            .step = steps[rows[i]],
                            .row = int32_t(rows[i]),
                            .param_dtype = kernel_dtype(p.scalar_type(), op, "params"),
                            .grad_dtype = kernel_dtype(g.scalar_type(), op, "grads")};
    }
    return step;
}

// State in tensors: plane by plane, one tensor per parameter in each plane.
inline void attach_state(Step& step, at::TensorList state, const char* op) {
    const std::vector<Plane>& planes = step.rule.planes;
    const size_t count = step.segments.size();
    TORCH_CHECK_VALUE(state.size() == count * planes.size(), op, ": ", count, " params need ",
                      count * planes.size(), " tensors of state, found ", state.size());
    for (size_t i = 0; i < state.size(); ++i) {
        const Plane& plane = planes[i / count];
        Segment& segment = step.segments[i % count];
        check_tensor(state[i], plane.dtype, step.device, op, "state");
        check_numel(state[i], plane.numel(segment.count), op, "state",
                    plane.elements == 1 ? "one an element" : "one a block of 256");
        TORCH_CHECK_VALUE(state[i].is_contiguous(), op, ": state must be contiguous");
        segment.state[i / count] = state[i].mutable_data_ptr();
    }
}

}  // namespace optim
}  // namespace peftcore
