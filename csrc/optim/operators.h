// The operators of all backends, which differ in how segments are updated, and in what is refused first: before pages
// move, whose copies could not be taken back. Schemas: peftcore/ops/optim.py.
#pragma once

#include "optim/paged_state.h"

namespace peftcore {
namespace optim {

inline void refuse_nothing(const Step&, const char*) {}

template <void (*update)(const Step& step, const std::vector<Segment>& segments, int64_t blocks_per_task),
          void (*refuse)(const Step& step, const char* op) = refuse_nothing>
struct Operators {
    static void optim_step_(at::TensorList params, at::TensorList grads, at::TensorList state,
                            std::string_view rule, at::ArrayRef<double> scalars, at::IntArrayRef steps,
                            at::IntArrayRef rows, at::IntArrayRef streams) {
        const char* op = "optim_step_";
        Step step = step_of(params, grads, {rule, scalars, steps, rows, streams}, op);
        attach_state(step, state, op);
        refuse(step, op);
        update(step, step.segments, kBlocksPerTask);
    }

    static void optim_step_paged_(at::TensorList params, at::TensorList grads, int64_t state,
                                  at::IntArrayRef slots, int64_t sweep, std::string_view rule,
                                  at::ArrayRef<double> scalars, at::IntArrayRef steps, at::IntArrayRef rows,
                                  at::IntArrayRef streams) {
        const char* op = "optim_step_paged_";
        const Step step = step_of(params, grads, {rule, scalars, steps, rows, streams}, op);
        refuse(step, op);
        state_of(state, op)->step(step, slots, sweep, update, op);
    }
};

}  // namespace optim
}  // namespace peftcore
