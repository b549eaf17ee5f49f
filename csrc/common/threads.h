// How parallel loops divide their work.
#pragma once

#include <ATen/Parallel.h>

namespace peftcore {

// The least work of a task, in products or in values that it goes through: below it, handing a task to another thread
// costs more than it saves.
constexpr int64_t kProductsPerTask = 1 << 17, kValuesPerTask = 1 << 15;

// Threads of a parallel loop started here. PyTorch runs a loop inside another one in the calling thread.
inline int64_t threads_here() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

}  // namespace peftcore
